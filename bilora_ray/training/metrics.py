"""What an evaluation measures: pure functions and one running sum. Torch tensors go in; torch is not imported."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bilora_ray.config import TrialConfig

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
NO_LABEL = -1
# So many logits are looked at together: 64 MiB of them in float32, where all may be many times that.
SCORES = 2**24
NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\.?")


@dataclass
class LossSum:
    """The running sum of a loss over the predictions of an evaluation, in float64.

    A prediction is one token of a completion, or one row of a classification.

    Attributes:
        negative_log_likelihood: sum over the predictions, in nats.
        count: predictions.
        correct: predictions whose most likely class is the right one.
    """

    negative_log_likelihood: float = 0.0
    count: int = 0
    correct: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add the predictions of one batch.

        Args:
            logits: (..., classes), any float type; `logits[i]` predicts `labels[i]`, so a causal model's are
                shifted by the caller.
            labels: (...), class indices; IGNORED where there is nothing to predict.
        """
        kept = labels != IGNORED
        if not kept.all():  # to select is to copy
            logits, labels = logits[kept], labels[kept]
        logits, labels = logits.flatten(0, -2), labels.flatten()
        losses, right = labels.double(), labels.new_zeros(())
        at_once = max(1, SCORES // logits.shape[-1])
        for start in range(0, len(labels), at_once):
            part = slice(start, start + at_once)
            scores, targets = logits[part].float(), labels[part]
            picked = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            losses[part] = scores.logsumexp(-1) - picked
            right += (scores.argmax(-1) == targets).sum()
        self.negative_log_likelihood += losses.sum().item()
        self.count += labels.numel()
        self.correct += int(right.item())

    @classmethod
    def of(cls, parts: Sequence[LossSum]) -> LossSum:
        """The sum of `parts`, added in their order."""
        total = cls()
        for part in parts:
            total.negative_log_likelihood += part.negative_log_likelihood
            total.count += part.count
            total.correct += part.correct
        return total

    @property
    def mean(self) -> float:
        """Loss per prediction, in nats; NaN without predictions."""
        return self.negative_log_likelihood / self.count if self.count else math.nan

    def metrics(self) -> dict[str, float]:
        """`eval_loss`, `eval_perplexity` and `eval_token_accuracy` of a language model."""
        return {
            "eval_loss": self.mean,
            "eval_perplexity": perplexity(self.mean),
            "eval_token_accuracy": self.correct / self.count if self.count else math.nan,
        }


def perplexity(loss: float) -> float:
    """e to the `loss`; infinite where that leaves the float range."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def answer(text: str, pattern: str | None) -> str | None:
    """The answer that `text` gives: group 1 of the last match of `pattern`, or the whole text without a pattern.

    Space around it is removed, and a number that the pattern found loses its thousands commas and its final period:
    "1,234." is "1234". None if nothing matches.
    """
    if pattern is None:
        return text.strip()
    found = None
    for match in re.finditer(pattern, text):
        found = match.group(1)
    if found is None:
        return None
    number = NUMBER.fullmatch(found.strip())
    if number is None:
        return found.strip()
    sign, whole, fraction = number.groups(default="")
    return sign + whole.replace(",", "") + fraction


def exact_match(predictions: Sequence[str], references: Sequence[str], pattern: str | None) -> float:
    """Share of `predictions` whose answer is that of the reference; a text without an answer is wrong."""
    assert len(predictions) == len(references) > 0
    pairs = zip(predictions, references, strict=True)
    answers = [(answer(prediction, pattern), answer(reference, pattern)) for prediction, reference in pairs]
    return sum(given is not None and given == wanted for given, wanted in answers) / len(answers)


def label_index(text: str, label_names: Sequence[str], pattern: str | None) -> int:
    """Index of the label that the answer in `text` is; NO_LABEL if it is none of `label_names`."""
    found = answer(text, pattern)
    return label_names.index(found) if found in label_names else NO_LABEL


@dataclass(frozen=True)
class F1:
    """Which F1 `eval_f1` is.

    Attributes:
        average: `binary`: that of the positive label; else scikit-learn's mean over the labels.
        positive: index of the positive label.
    """

    average: str
    positive: int = 1

    @classmethod
    def of(cls, config: TrialConfig, default: str) -> F1:
        """That of the settings, which name the labels if they name a positive one; without any, the `default`."""
        if config.positive_label is None:
            return cls(config.f1_average or default)
        assert config.label_names is not None, "the labels are not known yet"
        return cls(config.f1_average or "binary", config.label_names.index(config.positive_label))


def usual_average(num_labels: int) -> str:
    """Which `eval_f1` is where the settings do not say, and each row has one label."""
    return "binary" if num_labels == 2 else "macro"


def label_metrics(
    predicted: Sequence[int], reference: Sequence[int], num_labels: int, f1: F1 | None = None
) -> dict[str, float]:
    """`eval_accuracy`, `eval_f1` and `eval_matthews_correlation`.

    A mean F1 is over the labels that occur in either.

    Args:
        predicted: label indices; NO_LABEL, text that is no label, counts as wrong.
        reference: label indices.
        num_labels: size of the label set.
        f1: which it is; None: that of label 1 of two labels, as in GLUE, and else the mean over the labels.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    assert len(predicted) == len(reference) > 0
    occurring = {*predicted, *reference}
    f1 = f1 or F1(usual_average(num_labels))
    binary = f1.average == "binary"
    counted = [f1.positive] if binary else sorted(occurring - {NO_LABEL})
    average = "macro" if binary else f1.average
    right = sum(given == wanted != NO_LABEL for given, wanted in zip(predicted, reference, strict=True))
    return {
        "eval_accuracy": right / len(reference),
        "eval_f1": float(f1_score(reference, predicted, labels=counted, average=average, zero_division=0.0)),
        # Where all is one label, nothing correlates; scikit-learn says 0 as well, with a warning.
        "eval_matthews_correlation": float(matthews_corrcoef(reference, predicted)) if len(occurring) > 1 else 0.0,
    }


def set_metrics(predicted: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], f1: F1) -> dict[str, float]:
    """`eval_accuracy`, the share of rows whose whole set of labels is right, and `eval_f1`.

    Args:
        predicted: for each row 0 or 1 for each label.
        reference: the same.
        f1: which it is. A mean over labels is over those that occur in either.
    """
    import numpy
    from sklearn.metrics import f1_score

    given, wanted = numpy.asarray(predicted), numpy.asarray(reference)
    assert given.shape == wanted.shape
    binary = f1.average == "binary"
    counted = [f1.positive] if binary else numpy.flatnonzero((given | wanted).any(axis=0)).tolist()
    average = "macro" if binary else f1.average
    score = f1_score(wanted, given, labels=counted, average=average, zero_division=0.0) if counted else 0.0
    return {"eval_accuracy": float((given == wanted).all(axis=1).mean()), "eval_f1": float(score)}


def number_metrics(predicted: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """`eval_mse`, `eval_pearson` and `eval_spearman`.

    Where all that is predicted, or all that is right, is one number, nothing correlates: 0.
    """
    from scipy.stats import pearsonr, spearmanr

    pairs = list(zip(predicted, reference, strict=True))
    error = math.fsum((given - wanted) ** 2 for given, wanted in pairs) / len(pairs)
    found = {"eval_mse": error, "eval_pearson": 0.0, "eval_spearman": 0.0}
    if math.isfinite(error) and len(set(predicted)) > 1 and len(set(reference)) > 1:
        found["eval_pearson"] = float(pearsonr(predicted, reference).statistic)
        found["eval_spearman"] = float(spearmanr(predicted, reference).statistic)
    return found
