"""sequence-classification: a head on the model learns the label of a text, or of a pair of texts.

A text with more than `max_length` tokens loses its end; of a pair, the longer text first. With `truncation: drop` the
row is left out instead.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.training.data.columns import label_of, label_text_of, names_of, text_of
from bilora_ray.training.data.labels import LabelCounts, Unlearned, label_notes, majority, positive_notes
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import F1, IGNORED, LossSum, label_metrics, usual_average
from bilora_ray.training.tasks.base import (
    Answer,
    Cut,
    Dataset,
    Encoded,
    Example,
    Labels,
    Model,
    Prediction,
    Task,
    cross_entropy,
    known_labels,
    named,
    on_device,
    padded,
    stacked,
    with_label,
)
from bilora_ray.training.tasks.text import with_special_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers


# What transformers calls the head that it puts on a model for texts.
HEADS = ("classifier", "score")


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text, or a pair of texts, and what is learned of it: the index of its label, those of several, or a number."""

    text: str
    text_pair: str | None
    label: Any
    where: str


@dataclass(frozen=True)
class Measured:
    """Of the rows of one batch: their loss, and the indices of the labels that were found and that are right."""

    loss: LossSum
    predicted: list[int]
    reference: list[int]
    num_labels: int


def _label_names(records: Iterable[Record], config: TrialConfig) -> Labels:
    return names_of(((label_text_of(record, config.label_column), record.where) for record in records), config)


def _row(record: Record, config: TrialConfig, names: Labels) -> LabelledRow:
    assert names is not None
    return labelled_row(record, config, label_of(record, config, names))


def _asked(record: Record, config: TrialConfig) -> LabelledRow:
    names = known_labels(config)
    return _row(with_label(record, config, names[0]), config, names)


def labelled_row(record: Record, config: TrialConfig, label: Any) -> LabelledRow:
    """The record's text or pair of texts, with its `label`."""
    pair = None if config.text_pair_column is None else text_of(record, config.text_pair_column)
    return LabelledRow(text_of(record, config.text_column), pair, label, record.where)


def _about(dataset: Dataset, config: TrialConfig) -> Iterator[str]:
    counts = LabelCounts.of(dataset, _labels)
    yield from counts.lines()
    yield majority(counts, config).line(config)


def _unlearned(dataset: Dataset, config: TrialConfig) -> Unlearned:
    return majority(LabelCounts.of(dataset, _labels), config)


def _notes(dataset: Dataset, config: TrialConfig, validation_data: str) -> Iterator[str]:
    counts = LabelCounts.of(dataset, _labels)
    yield from label_notes(counts, config, validation_data)
    yield from positive_notes(counts.names, config)


def _labels(row: LabelledRow) -> tuple[int, ...]:
    return (row.label,)


def _examples(
    rows: Sequence[LabelledRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, keep_prompts: bool
) -> Iterator[Encoded]:
    return labelled_examples(rows, [array("i", _labels(row)) for row in rows], config, tokenizer)


def labelled_examples(
    rows: Sequence[LabelledRow],
    labels: Sequence[array[Any]],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Encoded]:
    """The texts of `rows` tokenized, each with its `labels`."""
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    inputs = with_special_tokens([row.text for row in rows], pairs or None, config.max_length, tokenizer)
    for learned, (ids, token_type_ids, cut) in zip(labels, inputs, strict=True):
        example = Example(ids, learned, token_type_ids=token_type_ids)
        yield [] if cut and config.truncation == "drop" else [(example, Cut.PROMPT if cut else Cut.NOTHING)]


def _collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """As `collate_texts`, with `labels` (batch,)."""
    labels = stacked([example.labels for example in examples], IGNORED)[:, 0]
    return {**collate_texts(examples, tokenizer), "labels": labels}


def collate_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """What the model reads: `input_ids`, `attention_mask` and, of pairs, `token_type_ids`, all (batch, length)."""
    batch = padded([example.input_ids for example in examples], tokenizer.pad_token_id)
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if types:
        batch["token_type_ids"] = stacked(types, 0)
    return batch


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return logits_of(model, batch), batch["labels"]


def logits_of(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """(batch, outputs of the head): what `model` makes of texts, without a look at their labels."""
    return model(**{key: tensor for key, tensor in batch.items() if key != "labels"}).logits


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Not the model's own, which is in the type of its logits, and of what its config says that it was trained for."""
    return cross_entropy(*_forward(model, batch))


def _measure(logits: Tensor, targets: Tensor) -> Measured:
    loss = LossSum()
    loss.add(logits, targets)
    return Measured(loss, logits.argmax(-1).tolist(), targets.tolist(), logits.shape[-1])


def _metrics(parts: Sequence[Measured], config: TrialConfig) -> dict[str, float]:
    loss = LossSum.of([part.loss for part in parts]).mean
    predicted = [label for part in parts for label in part.predicted]
    reference = [label for part in parts for label in part.reference]
    num_labels = parts[0].num_labels
    f1 = F1.of(config, usual_average(num_labels))
    return {"eval_loss": loss, **label_metrics(predicted, reference, num_labels, f1)}


def _predict(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Labels,
    workers: Workers,
) -> list[Prediction]:
    rows = predicted_alone(model, examples, tokenizer)
    return [likeliest(text, logits, example, label_names or ()) for example, text, logits in rows]


def likeliest(text: str, logits: Tensor, example: Example, names: Sequence[str]) -> Prediction:
    """The label with the largest of `logits` (labels,), float32, of the `text` of an example."""
    probability, label = logits.softmax(-1).max(-1)
    return Prediction(text, names[int(label)], names[example.labels[0]], float(probability))


def predicted_alone(
    model: Model, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, str, Tensor]]:
    """Each example with its text and its logits (outputs of the head,), float32."""
    for example in examples:
        batch = on_device(collate_texts([example], tokenizer), model)
        yield example, str(tokenizer.decode(example.input_ids.tolist())), logits_of(model, batch)[0].float()


def answers(logits: Tensor, targets: Tensor, label_names: Labels) -> list[Answer]:
    """Of each row its likeliest label, and how likely each label is; (rows, labels)."""
    names = label_names or ()
    return [Answer(names[int(row.argmax())], named(row.softmax(-1), names)) for row in logits.float()]


def _learned(example: Example, tokenizer: PreTrainedTokenizerBase, label_names: Labels) -> str:
    assert label_names is not None
    return label_names[example.labels[0]]


def named_labels(problem_type: str, label_names: Labels) -> dict[str, Any]:
    """What `from_pretrained` takes for a head of labels: the base may have been trained for another problem."""
    names = dict(enumerate(label_names or ()))
    return {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": problem_type,
    }


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
    answers=answers,
    learned=_learned,
    label_names=_label_names,
    labels=_labels,
    notes=_notes,
    about=_about,
    unlearned=_unlearned,
    model_arguments=partial(named_labels, "single_label_classification"),
    heads=HEADS,
)
