"""regression: a head on the model learns a number of a text, or of a pair of texts.

The loss is the mean squared error, in float32, of the labels as they are: they are not scaled.
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.training.data.columns import number_of
from bilora_ray.training.data.labels import Unlearned
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import number_metrics
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
    with_label,
)
from bilora_ray.training.tasks.sequence_classification import (
    HEADS,
    LabelledRow,
    collate_texts,
    labelled_examples,
    labelled_row,
    logits_of,
    predicted_alone,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers

# A head starts near 0, and a step of AdamW moves its bias by the learning rate.
FAR = 100.0


@dataclass(frozen=True)
class Measured:
    """Of the rows of one batch: the numbers that were found, and those that are right."""

    predicted: list[float]
    reference: list[float]


def _no_names(*_: Any) -> Labels:
    return None


def _row(record: Record, config: TrialConfig, names: Labels) -> LabelledRow:
    return labelled_row(record, config, number_of(record, config.label_column))


def _asked(record: Record, config: TrialConfig) -> LabelledRow:
    return _row(with_label(record, config, 0), config, None)


def _examples(
    rows: Sequence[LabelledRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, keep_prompts: bool
) -> Iterator[Encoded]:
    return labelled_examples(rows, [array("f", [row.label]) for row in rows], config, tokenizer)


def _collate(examples: Sequence[Example], tokenizer: Processor) -> dict[str, Tensor]:
    """As `collate_texts`, with `labels` (batch,), float32."""
    import torch

    labels = torch.tensor([example.labels[0] for example in examples], dtype=torch.float32)
    return {**collate_texts(examples, tokenizer), "labels": labels}


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A number for each row, (batch,), and the right ones."""
    return logits_of(model, batch).squeeze(-1), batch["labels"]


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    from torch.nn import functional

    numbers, targets = _forward(model, batch)
    return functional.mse_loss(numbers.float(), targets)


def _measure(numbers: Tensor, targets: Tensor) -> Measured:
    return Measured(numbers.float().tolist(), targets.tolist())


def _metrics(parts: Sequence[Measured], config: TrialConfig) -> dict[str, float]:
    predicted = [number for part in parts for number in part.predicted]
    reference = [number for part in parts for number in part.reference]
    metrics = number_metrics(predicted, reference)
    return {"eval_loss": metrics["eval_mse"], **metrics}


def _predict(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Labels,
    workers: Workers,
) -> list[Prediction]:
    rows = predicted_alone(model, examples, tokenizer)
    return [Prediction(text, f"{float(number):.6g}", f"{example.labels[0]:.6g}") for example, text, number in rows]


def _answers(numbers: Tensor, targets: Tensor, label_names: Labels) -> list[Answer]:
    return [Answer(number) for number in numbers.float().tolist()]


def _learned(example: Example, tokenizer: PreTrainedTokenizerBase, label_names: Labels) -> str:
    return f"{example.labels[0]:.6g}"


def _about(dataset: Dataset, config: TrialConfig) -> Iterator[str]:
    train, validation = (_numbers(rows) for rows in (dataset.train, dataset.validation))
    for split, numbers in (("train", train), ("validation", validation)):
        mean, spread = statistics.fmean(numbers), statistics.pstdev(numbers)
        span = f"{min(numbers):.4g} to {max(numbers):.4g}"
        yield f"{split} labels: {span}, mean {mean:.4g}, standard deviation {spread:.4g}"
    yield _unlearned(dataset, config).line(config)


def _unlearned(dataset: Dataset, config: TrialConfig) -> Unlearned:
    mean, validation = statistics.fmean(_numbers(dataset.train)), _numbers(dataset.validation)
    metrics = _metrics([Measured([mean] * len(validation), validation)], config)
    return Unlearned("mean", f"every row is {mean:.4g}", metrics[config.metric])


def _notes(dataset: Dataset, config: TrialConfig, validation_data: str) -> Iterator[str]:
    for setting, kind, rows in (
        ("train_data", "training", dataset.train),
        (validation_data, "validation", dataset.validation),
    ):
        if len(set(_numbers(rows))) == 1:
            yield f"{setting}: every {kind} row has the label {_numbers(rows)[0]:.6g}"
    farthest = max(_numbers(dataset.train), key=abs)
    if abs(farthest) > FAR:
        yield f"label_column: labels as far from 0 as {farthest:.6g} are learned slowly; scale them to some units"


def _numbers(rows: Iterable[Any]) -> list[float]:
    return [row.label for row in rows]


def _model_arguments(label_names: Labels) -> dict[str, Any]:
    return {"num_labels": 1, "problem_type": "regression"}


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
    label_names=_no_names,
    notes=_notes,
    about=_about,
    unlearned=_unlearned,
    model_arguments=_model_arguments,
    heads=HEADS,
)
