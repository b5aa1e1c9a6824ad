"""Metrics against their definitions, written out the slow way."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn import functional

from bilora_ray.config import TrialConfig
from bilora_ray.training.metrics import (
    F1,
    IGNORED,
    NO_LABEL,
    LossSum,
    answer,
    exact_match,
    label_index,
    label_metrics,
    perplexity,
    usual_average,
)

GSM8K = r"#### (.+)"


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("  yes \n", None, "yes"),
        ("1,234.", None, "1,234."),
        ("", None, ""),
        ("#### 72", GSM8K, "72"),
        ("#### 1\n#### 2", GSM8K, "2"),
        ("####  1,234. ", GSM8K, "1234"),
        ("#### -1,234,567.5", GSM8K, "-1234567.5"),
        ("#### 3.", GSM8K, "3"),
        ("#### 1,23", GSM8K, "1,23"),
        ("#### $5", GSM8K, "$5"),
        ("#### e.g.", GSM8K, "e.g."),
        ("no answer", GSM8K, None),
        ("b", r"a(x)?|b", None),
        ("ax b", r"a(x)?|b", None),
    ],
)
def test_answer(text: str, pattern: str | None, expected: str | None) -> None:
    assert answer(text, pattern) == expected


def test_exact_match_is_the_share_of_equal_answers() -> None:
    predictions = ["so #### 1,000.", "#### 5", "I do not know", "6"]
    references = ["#### 1000", "#### 6", "no answer either", "#### 6"]
    assert exact_match(predictions, references, GSM8K) == 0.25
    assert exact_match([" a", "b"], ["a ", "c"], None) == 0.5


def test_label_index() -> None:
    assert label_index(" positive\n", ("negative", "positive"), None) == 1
    assert label_index("Positive", ("negative", "positive"), None) == -1
    assert label_index("so: b.", ("a", "b"), r"so: (\w)") == 1
    assert label_index("nothing", ("a", "b"), r"so: (\w)") == -1


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_how_many_logits_are_looked_at_together_does_not_matter(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(30, 7), torch.randint(7, (30,))
    labels[kept:] = IGNORED
    expected = LossSum()
    expected.add(logits, labels)
    monkeypatch.setattr("bilora_ray.training.metrics.SCORES", 4 * 7)
    found = LossSum()
    found.add(logits.view(5, 6, 7), labels.view(5, 6))
    assert found == expected
    assert found.count == kept
    by_definition = functional.cross_entropy(logits.double(), labels, ignore_index=IGNORED, reduction="sum")
    assert found.negative_log_likelihood == pytest.approx(by_definition.item(), rel=1e-5)


def _f1(predicted: list[int], reference: list[int], label: int) -> float:
    hits = sum(p == r == label for p, r in zip(predicted, reference, strict=True))
    total = predicted.count(label) + reference.count(label)
    return 2 * hits / total if total else 0.0


def _matthews(predicted: list[int], reference: list[int]) -> float:
    """Correlation of the one-hot codes (Gorodkin 2004)."""
    classes = sorted({*predicted, *reference})
    x = torch.tensor([[float(p == c) for c in classes] for p in predicted], dtype=torch.float64)
    y = torch.tensor([[float(r == c) for c in classes] for r in reference], dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    scale = ((x * x).sum() * (y * y).sum()).sqrt()
    return float((x * y).sum() / scale) if scale else 0.0


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_labels", [2, 3, 5])
@pytest.mark.parametrize("lowest", [-1, 0])
def test_label_metrics_are_their_definitions(seed: int, num_labels: int, lowest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(lowest, num_labels, (40,), generator=generator).tolist()
    reference = torch.randint(0, num_labels, (40,), generator=generator).tolist()
    counted = [1] if num_labels == 2 else range(num_labels)
    scores = [_f1(predicted, reference, label) for label in counted]
    accuracy = sum(p == r for p, r in zip(predicted, reference, strict=True)) / 40
    assert label_metrics(predicted, reference, num_labels) == {
        "eval_accuracy": pytest.approx(accuracy),
        "eval_f1": pytest.approx(sum(scores) / len(scores)),
        "eval_matthews_correlation": pytest.approx(_matthews(predicted, reference)),
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("lowest", [-1, 0])
def test_each_f1_is_scikit_learns(seed: int, num_labels: int, lowest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(lowest, num_labels, (40,), generator=generator).tolist()
    reference = torch.randint(0, num_labels, (40,), generator=generator).tolist()

    def measured(**settings: Any) -> float:
        config = TrialConfig(
            model_name_or_path="m",
            task="sequence-classification",
            train_data="d",
            label_names=tuple("abc"[:num_labels]),
            **settings,
        )
        return label_metrics(predicted, reference, num_labels, F1.of(config, usual_average(num_labels)))["eval_f1"]

    labels = list(range(num_labels))
    for average in ("macro", "micro", "weighted"):
        expected = f1_score(reference, predicted, labels=labels, average=average, zero_division=0)
        assert measured(f1_average=average) == pytest.approx(expected)
    for position, name in enumerate("abc"[:num_labels]):
        expected = _f1(predicted, reference, position)
        assert measured(positive_label=name) == pytest.approx(expected)
        assert measured(positive_label=name, f1_average="binary") == pytest.approx(expected)
    assert measured() == label_metrics(predicted, reference, num_labels)["eval_f1"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predicted", "reference", "num_labels", "accuracy", "f1"),
    [
        ([0, 0], [0, 0], 2, 1.0, 0.0),
        ([1, 1], [1, 1], 2, 1.0, 1.0),
        ([-1, -1], [0, 1], 2, 0.0, 0.0),
        ([-1, -1, -1], [0, 1, 2], 3, 0.0, 0.0),
        ([0, 1], [0, 1], 9, 1.0, 1.0),
        ([1], [0], 2, 0.0, 0.0),
    ],
)
def test_label_metrics_at_the_edges(
    predicted: list[int], reference: list[int], num_labels: int, accuracy: float, f1: float
) -> None:
    metrics = label_metrics(predicted, reference, num_labels)
    assert (metrics["eval_accuracy"], metrics["eval_f1"]) == (accuracy, f1)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_sum_in_batches_is_the_mean_over_all_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 6, 11, generator=generator)).to(dtype)
    labels = torch.randint(0, 11, (7, 6), generator=generator)
    labels[torch.rand(7, 6, generator=generator) < 0.4] = IGNORED
    loss = LossSum()
    for start in range(0, 7, 3):
        loss.add(logits[start : start + 3], labels[start : start + 3])
    kept = labels != IGNORED
    mean = functional.cross_entropy(logits[kept].double(), labels[kept]).item()
    right = (logits.argmax(-1) == labels)[kept].double().mean().item()
    assert loss.count == int(kept.sum())
    assert loss.metrics() == {
        "eval_loss": pytest.approx(mean, rel=1e-6),
        "eval_perplexity": pytest.approx(math.exp(mean), rel=1e-5),
        "eval_token_accuracy": pytest.approx(right),
    }


def test_loss_sum_of_a_classification_is_the_mean_over_rows() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    loss = LossSum()
    loss.add(logits, labels)
    assert loss.mean == pytest.approx(functional.cross_entropy(logits, labels).item())
    assert (loss.count, loss.correct) == (3, 2)


def test_loss_sum_is_kept_in_float64() -> None:
    count = 1_000_001
    loss = LossSum()
    for _ in range(2):
        loss.add(torch.zeros(count, 3), torch.zeros(count, dtype=torch.int64))
    one = torch.zeros(3).logsumexp(0).item()
    assert loss.negative_log_likelihood == pytest.approx(2 * count * one, abs=1e-6)


def test_loss_sum_without_predictions_and_with_ignored_ones_only() -> None:
    loss = LossSum()
    loss.add(torch.zeros(1, 2, 3), torch.full((1, 2), IGNORED))
    assert loss.count == 0
    assert all(math.isnan(value) for value in loss.metrics().values())


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_what_is_no_label_is_right_of_nothing() -> None:
    assert label_metrics([NO_LABEL, 0], [NO_LABEL, 0], 2)["eval_accuracy"] == 0.5
