"""multi-label-classification: a head on the model learns which labels a text, or a pair of texts, has: none to all.

The loss is the mean binary cross-entropy over rows and labels; a row is given each label that is likelier than not.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bilora_ray.config import TrialConfig
from bilora_ray.training.data.columns import index_of, labels_of, names_of
from bilora_ray.training.data.labels import SHARES, LabelCounts, Unlearned, by_label, label_notes, most_frequent
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import F1, IGNORED, set_metrics
from bilora_ray.training.tasks.base import (
    Answer,
    Dataset,
    Encoded,
    Example,
    Labels,
    Model,
    Prediction,
    Processor,
    Task,
    known_labels,
    named,
    stacked,
    with_label,
)
from bilora_ray.training.tasks.sequence_classification import (
    HEADS,
    LabelledRow,
    collate_texts,
    labelled_examples,
    labelled_row,
    logits_of,
    named_labels,
    predicted_alone,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers


@dataclass(frozen=True)
class Measured:
    """Of the rows of one batch: the sum of their losses, in nats, and 0 or 1 for each label, as found and as right."""

    loss: float
    predicted: list[list[int]]
    reference: list[list[int]]


def _label_names(records: Iterable[Record], config: TrialConfig) -> Labels:
    each = ((labels_of(record, config.label_column, config.label_delimiter), record.where) for record in records)
    return names_of(((label, where) for labels, where in each for label in labels), config)


def _row(record: Record, config: TrialConfig, names: Labels) -> LabelledRow:
    assert names is not None
    found = labels_of(record, config.label_column, config.label_delimiter)
    return labelled_row(record, config, tuple(sorted({index_of(one, config, names, record.where) for one in found})))


def _asked(record: Record, config: TrialConfig) -> LabelledRow:
    return _row(with_label(record, config, []), config, known_labels(config))


def _labels(row: LabelledRow) -> tuple[int, ...]:
    labels: tuple[int, ...] = row.label
    return labels


def _examples(
    rows: Sequence[LabelledRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, keep_prompts: bool
) -> Iterator[Encoded]:
    return labelled_examples(rows, [array("i", row.label) for row in rows], config, tokenizer)


def _collate(examples: Sequence[Example], tokenizer: Processor) -> dict[str, Tensor]:
    """As `collate_texts`, with the indices of the `labels`, (batch, most labels of a row), padded with IGNORED."""
    labels = stacked([example.labels for example in examples], IGNORED)
    return {**collate_texts(examples, tokenizer), "labels": labels}


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and, as many, 1 where a row has the label and 0 where it has not: (batch, labels)."""
    logits, labels = logits_of(model, batch), batch["labels"]
    count = logits.shape[-1]
    # What is no label goes into a column of its own, which is cut off.
    columns = labels.masked_fill(labels == IGNORED, count)
    return logits, logits.new_zeros(len(logits), count + 1).scatter(1, columns, 1.0)[:, :count]


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    from torch.nn import functional

    logits, targets = _forward(model, batch)
    return functional.binary_cross_entropy_with_logits(logits.float(), targets.float())


def _measure(logits: Tensor, targets: Tensor) -> Measured:
    from torch.nn import functional

    losses = functional.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    loss = losses.double().mean(-1).sum().item()
    return Measured(loss, (logits > 0).int().tolist(), targets.int().tolist())


def _metrics(parts: Sequence[Measured], config: TrialConfig) -> dict[str, float]:
    predicted = [row for part in parts for row in part.predicted]
    reference = [row for part in parts for row in part.reference]
    loss = math.fsum(part.loss for part in parts) / len(reference)
    return {"eval_loss": loss, **set_metrics(predicted, reference, _f1(config))}


def _f1(config: TrialConfig) -> F1:
    return F1.of(config, "micro" if config.positive_label is None else "binary")


def _predict(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Labels,
    workers: Workers,
) -> list[Prediction]:
    return [
        Prediction(
            text, _named((logits > 0).nonzero().flatten().tolist(), label_names), _named(example.labels, label_names)
        )
        for example, text, logits in predicted_alone(model, examples, tokenizer)
    ]


def _answers(logits: Tensor, targets: Tensor, label_names: Labels) -> list[Answer]:
    likely = [named(row.sigmoid(), label_names) for row in logits.float()]
    found = [named(row, label_names) for row in logits > 0]
    return [Answer([name for name, has in row.items() if has], each) for row, each in zip(found, likely, strict=True)]


def _learned(example: Example, tokenizer: PreTrainedTokenizerBase, label_names: Labels) -> str:
    return _named(example.labels, label_names)


def _named(labels: Iterable[int], label_names: Labels) -> str:
    assert label_names is not None
    return ", ".join(label_names[label] for label in labels)


def _about(dataset: Dataset, config: TrialConfig) -> Iterator[str]:
    yield from LabelCounts.of(dataset, _labels).lines()
    yield _unlearned(dataset, config).line(config)


def _unlearned(dataset: Dataset, config: TrialConfig) -> Unlearned:
    counts = LabelCounts.of(dataset, _labels)
    if config.metric == "eval_loss":
        return Unlearned("majority", SHARES, _loss_of_shares(counts))
    count, usual = len(counts.names), most_frequent(counts.train)
    reference = [_indicator(labels, count) for labels in counts.validation.elements()]
    named = config.model_copy(update={"label_names": tuple(counts.names)})
    metrics = set_metrics([_indicator(usual, count)] * len(reference), reference, _f1(named))
    said = ", ".join(f"'{counts.names[label]}'" for label in usual) or "without a label"
    return Unlearned("majority", f"every row is {said}", metrics[config.metric])


def _indicator(labels: Sequence[int], count: int) -> list[int]:
    return [int(label in labels) for label in range(count)]


def _loss_of_shares(counts: LabelCounts) -> float:
    """The loss where each label has the probability that its share of the training rows is."""
    train, validation = by_label(counts.train), by_label(counts.validation)
    rows, measured, loss = counts.train.total(), counts.validation.total(), 0.0
    for label in range(len(counts.names)):
        for share, found in (
            (train[label] / rows, validation[label]),
            (1 - train[label] / rows, measured - validation[label]),
        ):
            loss += found * (-math.log(share) if share > 0 else math.inf) if found else 0.0
    return loss / (measured * len(counts.names))


def _notes(dataset: Dataset, config: TrialConfig, validation_data: str) -> Iterator[str]:
    yield from label_notes(LabelCounts.of(dataset, _labels), config, validation_data)


TASK = Task(
    peft_type="SEQ_CLS",
    row=_row,
    examples=_examples,
    collate=_collate,
    target_count=len,
    forward=_forward,
    loss=_loss,
    measure=_measure,
    metrics=_metrics,
    predict=_predict,
    asked=_asked,
    answers=_answers,
    learned=_learned,
    label_names=_label_names,
    labels=_labels,
    notes=_notes,
    about=_about,
    unlearned=_unlearned,
    model_arguments=partial(named_labels, "multi_label_classification"),
    heads=HEADS,
)
