"""image-classification: a head on the model learns the label of an image.

An image is decoded each time that it is needed, one batch at a time, and is made as large as the base model's image
processor says. Nothing is drawn at random: rows are not augmented. Labels are those of sequence-classification.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bilora_ray.config import TrialConfig
from bilora_ray.training.data.columns import label_of, value_of
from bilora_ray.training.data.files.images import StoredImage, pixels, stored
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.tasks import sequence_classification
from bilora_ray.training.tasks.base import (
    Cut,
    Encoded,
    Example,
    Labels,
    Model,
    Prediction,
    Processor,
    known_labels,
    on_device,
    stacked,
    with_label,
)
from bilora_ray.training.tasks.sequence_classification import likeliest

if TYPE_CHECKING:
    from torch import Tensor

    from bilora_ray.training.distributed.workers import Workers


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image, and the index of its label."""

    image: StoredImage
    label: int
    where: str


def _row(record: Record, config: TrialConfig, names: Labels) -> ImageRow:
    assert names is not None
    image = stored(value_of(record, config.image_column), record.where)
    return ImageRow(image, label_of(record, config, names), record.where)


def _asked(record: Record, config: TrialConfig) -> ImageRow:
    names = known_labels(config)
    return _row(with_label(record, config, names[0]), config, names)


def _examples(
    rows: Sequence[ImageRow], config: TrialConfig, processor: Processor, keep_prompts: bool
) -> Iterator[Encoded]:
    for row in rows:
        yield [(Example(array("i"), array("i", [row.label]), image=row.image), Cut.NOTHING)]


def _collate(examples: Sequence[Example], processor: Processor) -> dict[str, Tensor]:
    """`pixel_values` (batch, channels, height, width), float32, and `labels` (batch,), int64."""
    images = [pixels(example.image) for example in examples if example.image is not None]
    values = processor(images=images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": values, "labels": stacked([example.labels for example in examples], IGNORED)[:, 0]}


def _predict(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    processor: Processor,
    label_names: Labels,
    workers: Workers,
) -> list[Prediction]:
    predictions, names = [], label_names or ()
    for example in examples:
        assert example.image is not None
        logits = model(**on_device(_pixel_values(example, processor), model)).logits[0].float()
        predictions.append(likeliest(example.image.name, logits, example, names))
    return predictions


def _pixel_values(example: Example, processor: Processor) -> dict[str, Tensor]:
    return {"pixel_values": _collate([example], processor)["pixel_values"]}


def _read(example: Example, processor: Processor) -> str:
    assert example.image is not None
    shape = _pixel_values(example, processor)["pixel_values"].shape[1:]
    return f"{example.image.name}, as {' x '.join(map(str, shape))} numbers"


TASK = replace(
    sequence_classification.TASK,
    peft_type=None,
    row=_row,
    examples=_examples,
    collate=_collate,
    predict=_predict,
    asked=_asked,
    read=_read,
    heads=("classifier", "cls_classifier", "distillation_classifier"),
)
