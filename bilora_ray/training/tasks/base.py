"""What a task is, and what all tasks share: the example, and how examples become tensors.

Torch is imported by what makes tensors only, for rows are checked without it.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.compute.varlen import placed
from bilora_ray.training.data.files.images import StoredImage
from bilora_ray.training.data.labels import Unlearned
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from bilora_ray.training.compute.generation import Read
    from bilora_ray.training.distributed.workers import Workers

# A transformers model or a PEFT model around one: neither's stubs know what the other adds.
Model = Any
# What makes a model's inputs: its tokenizer, or its image processor where the task reads images.
Processor = Any
Labels = tuple[str, ...] | None


class Row(Protocol):
    """What a record is to a task: a frozen dataclass."""

    @property
    def where(self) -> str:
        """The row's place, for errors."""


@dataclass(frozen=True)
class Dataset:
    """All the rows of one trial, or of the beginnings of large sources.

    Attributes:
        train: rows to train on, in the order of their source: a list, or what reads a large one again at each pass.
        validation: rows to evaluate on, the same way.
        label_names: names by label index; None where the task has no labels.
        digests: what identifies the content, by setting (`train_data`, `validation_data`); the latter is absent
            when validation rows are split off the training data. See `sources.Source`.
        partial: the settings whose sources have more rows than there are here -> bytes of all of that source.
        format: what the columns mean, named or found.
    """

    train: Collection[Row]
    validation: Collection[Row]
    label_names: Labels
    digests: Mapping[str, str]
    partial: Mapping[str, int] = field(default_factory=dict)
    format: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenized and not padded. Ids are 32-bit integers.

    Attributes:
        input_ids: (length,).
        labels: causal-lm: (length,), IGNORED where nothing is learned; seq2seq-lm: (target length,), the
            completion and the end of sequence; a classification of rows: (1,), the label index; of words: (length,),
            the index of the tag at a word's first token, else IGNORED; multi-label-classification: (labels,), the
            indices of those that the row has; regression: (1,), the number, a 32-bit float.
        prompt_ids: (prompt length,), what generation starts from; None where nothing is generated.
        token_type_ids: (length,), 1 on the second text of a pair, for models that have such an input.
        reference: text of the completion; token-classification: the words; empty where rows are classified.
        image: what is read instead of `input_ids`, which are none then. It is decoded when a batch is made of it.
    """

    input_ids: array[int]
    labels: array[Any]
    prompt_ids: array[int] | None = None
    token_type_ids: array[int] | None = None
    reference: str = ""
    image: StoredImage | None = None

    @property
    def length(self) -> int:
        """How many tokens are read; an image counts as one."""
        return len(self.input_ids) + (self.image is not None)


class Cut(Flag):
    """What `max_length` took from an example: tokens of its prompt or text, next to all of its prompt, the end of what
    is learned, earlier turns that would be learned too. And what `max_new_tokens` would take from a text that is its
    reference: the answer."""

    NOTHING = 0
    PROMPT = auto()
    WHOLE_PROMPT = auto()
    COMPLETION = auto()
    TURNS = auto()
    ANSWER = auto()


# What becomes of a row: as a rule one example.
Encoded = Sequence[tuple[Example, Cut]]


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a row.

    Attributes:
        input: the row as the model reads it, with special tokens; its words; or the name of the image.
        prediction: what it writes then, or the label that it finds most likely, of words one each, or the labels or the
            number.
        reference: the row's completion, label, labels or number; of words a label each.
        probability: that the model gives the label, where it is one; None of all else.
    """

    input: str
    prediction: str
    reference: str
    probability: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a model makes of a row, for a program to read: JSON values.

    Attributes:
        prediction: what it writes, the label, the labels, a tag for each word that was read, or the number.
        probabilities: by label, in the order of the labels; of words one such mapping each. None where there are none.
    """

    prediction: Any
    probabilities: Any = None


def given_labels(records: Iterable[Record], config: TrialConfig) -> Labels:
    """The labels that the settings name."""
    return config.label_names


def no_labels(row: Any) -> tuple[int, ...]:
    """Where rows have no labels."""
    return ()


def read_alone(example: Example) -> tuple[int, ...]:
    """What is read, where nothing is written beside it."""
    return (example.length,)


def decoded_input(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that is read, with special tokens."""
    return str(tokenizer.decode(example.input_ids.tolist()))


def decoded_labels(example: Example, tokenizer: PreTrainedTokenizerBase, label_names: Labels) -> str:
    """The text of the tokens that are learned."""
    return str(tokenizer.decode([token for token in example.labels if token != IGNORED]))


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The mean loss over `targets` (...), in nats; scalar, float32 whatever the `logits` (..., classes) are.

    With `class_weights` (classes,), float32, it is the weighted mean: the weights of the targets add up to one.
    """
    from torch.nn import functional

    scores, classes = logits.float().flatten(0, -2), targets.flatten()
    return functional.cross_entropy(scores, classes, weight=class_weights, ignore_index=IGNORED)


def balanced(labels: Iterable[int], num_labels: int) -> list[float]:
    """The weight of each class, scikit-learn's `balanced`: n / (k n_c) of n labels of k classes, n_c of which are c.

    A class that does not occur has no weight, and is none of the k.
    """
    counts = Counter(labels)
    return [counts.total() / (len(counts) * counts[label]) if counts[label] else 0.0 for label in range(num_labels)]


def named(values: Tensor, label_names: Labels) -> dict[str, float]:
    """`values` (labels,) by label."""
    return dict(zip(label_names or (), values.tolist(), strict=True))


def known_labels(config: TrialConfig) -> tuple[str, ...]:
    """The labels of an adapter that is asked. UserError if nobody knows them."""
    if config.label_names is None:
        raise UserError("label_names: the adapter does not know them; --set 'label_names=[...]' names them, in order")
    return config.label_names


def with_label(record: Record, config: TrialConfig, label: Any) -> Record:
    """The record of which nobody knows the label yet, with one that stands in for it."""
    return Record({**record.columns, config.label_column: label}, record.where)


def nothing(*_: Any, **__: Any) -> Any:
    """Where a task has no such facts: no problems, no notes, no metrics, no arguments."""
    return {}


@dataclass(frozen=True)
class Task:
    """All that is known of one task beside what the settings are checked by (`measures.TASK_FACTS`).

    Attributes:
        peft_type: name of PEFT's TaskType; None where PEFT has none, and its model hands all inputs on.
        row: a record and the label names -> the task's row. UserError if the record is none.
        examples: rows, the tokenizer (or image processor), and whether prompts are kept -> what becomes of each row.
            UserError if the tokenizer lacks what the task needs.
        collate: examples and the tokenizer -> a batch to compute the loss of: int64, padded at the right; or float32
            `pixel_values`. UserError for an image that cannot be decoded.
        target_count: how many predictions the mean loss over examples is of, or what they weigh.
        forward: a model and a batch -> logits (..., classes) and the targets (...) that they predict, IGNORED where
            there is nothing to predict.
        loss: a model and a batch -> the mean loss that is trained; scalar, float32.
        measure: logits and targets of one batch -> what `metrics` needs of them, with no tensor in it.
        metrics: what `measure` gave, by batch, and the settings, with the names of the labels -> metrics by name.
        predict: what a model makes of examples, for people to read.
        asked: a record that need not have an answer, and the settings -> the task's row, as good as any to read.
            UserError if what is asked is not there.
        answers: logits and targets of one batch, as `forward` gives them, and label names -> what there is
            to say of each row; None where a model writes.
        of_prompt: a text that was typed -> what a column has of it.
        sides: how many positions an example has in each part of the model: encoder and decoder are padded apart.
        read: what is read of an example, for people to read.
        learned: what is learned of an example, for people to read.
        label_names: records of the training data -> names by label index.
        labels: a row -> the indices of its labels; rows are drawn so that each draw has all labels' shares.
        check: UserError unless validation rows can be measured.
        notes: lines about a dataset that is allowed and yet seldom meant; the last argument is the setting that
            decides its validation rows.
        about: lines about a dataset, for people to read: its labels, and what the metric is without learning.
        unlearned: what the metric is without learning, where an answer needs none; nothing where texts are written.
        tokenizer_notes: as `notes`, about what the tokenizer makes of the rows.
        generated: metrics of what a model writes, with `predict_with_generate`; the last argument is what a pass
            over each example says of how it would be written, if it does.
        stops: tokens at which a text that was learned ends, if the model would go on behind one of them.
        model_arguments: label names -> what `from_pretrained` takes beside what all tasks give it.
        heads: modules that are trained and saved whole: by PEFT itself if it has a type for the task.
        takes_messages: whether a row may be a conversation.
        continues: whether what a model writes goes on with its prompt, and shares `max_length` with it.
    """

    peft_type: str | None
    row: Callable[[Record, TrialConfig, Labels], Row]
    examples: Callable[
        [Sequence[Any], TrialConfig, Processor, bool],
        Iterator[Encoded],
    ]
    collate: Callable[[Sequence[Example], Processor], dict[str, Tensor]]
    target_count: Callable[[Sequence[Example]], float]
    forward: Callable[[Model, dict[str, Tensor]], tuple[Tensor, Tensor]]
    loss: Callable[[Model, dict[str, Tensor]], Tensor]
    measure: Callable[[Tensor, Tensor], Any]
    metrics: Callable[[Sequence[Any], TrialConfig], dict[str, float]]
    predict: Callable[
        [Model, Sequence[Example], TrialConfig, Processor, Labels, Workers],
        list[Prediction],
    ]
    asked: Callable[[Record, TrialConfig], Row]
    answers: Callable[[Tensor, Tensor, Labels], list[Answer]] | None = None
    of_prompt: Callable[[str], Any] = str
    sides: Callable[[Example], tuple[int, ...]] = read_alone
    read: Callable[[Example, Processor], str] = decoded_input
    learned: Callable[[Example, Processor, Labels], str] = decoded_labels
    label_names: Callable[[Iterable[Record], TrialConfig], Labels] = given_labels
    labels: Callable[[Any], tuple[int, ...]] = no_labels
    check: Callable[[Collection[Any], TrialConfig], None] = nothing
    notes: Callable[[Dataset, TrialConfig, str], Iterable[str]] = nothing
    about: Callable[[Dataset, TrialConfig], Iterable[str]] = nothing
    unlearned: Callable[[Dataset, TrialConfig], Unlearned] = nothing
    tokenizer_notes: Callable[[Dataset, TrialConfig, PreTrainedTokenizerBase], Iterable[str]] = nothing
    generated: Callable[
        [Model, Sequence[Example], TrialConfig, Processor, Workers, Sequence[Read] | None],
        dict[str, float],
    ] = nothing
    stops: Callable[[Model, PreTrainedTokenizerBase, TrialConfig], Sequence[int]] = nothing
    model_arguments: Callable[[Labels], dict[str, Any]] = nothing
    heads: tuple[str, ...] = ()
    takes_messages: bool = False
    continues: bool = False


def weighted(task: Task, examples: Iterable[Example], num_labels: int) -> Task:
    """`task`, in whose training loss the classes of `examples` are balanced, however many of each there are."""
    weights = balanced(_classes(examples), num_labels)

    def target_count(some: Sequence[Example]) -> float:
        return math.fsum(weights[label] for label in _classes(some))

    @cache
    def on(device: torch.device) -> Tensor:
        import torch

        return torch.tensor(weights, device=device)

    def loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
        logits, targets = task.forward(model, batch)
        return cross_entropy(logits, targets, on(logits.device))

    return replace(task, target_count=target_count, loss=loss)


def _classes(examples: Iterable[Example]) -> Iterator[int]:
    """The classes that a task with classes predicts."""
    return (label for example in examples for label in example.labels if label != IGNORED)


def check_positions(positions: int | None, config: TrialConfig, continues: bool) -> None:
    """UserError unless a row is no longer than so many positions; None, 0 or less: no end, as of XLNet's -1.

    Nor may a measured text be, unless it `continues` its prompt: then both are in a row.
    """
    for setting in ("max_length", *(["max_new_tokens"] if config.predict_with_generate and not continues else [])):
        length = getattr(config, setting)
        if positions is not None and 0 < positions < length:
            line = f"{setting}: {length} is more than the model's {positions} positions"
            raise UserError(f"{line}; write {positions} or less")


def padded(sequences: Sequence[array[int]], pad_token_id: int, left: bool = False) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (batch, length), int64, padded at the right unless at the `left`."""
    import torch

    input_ids = stacked(sequences, pad_token_id, left)
    # The mask goes by length: the padding token is often the end of sequence, which is a real token too.
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": (mask.flip(1) if left else mask).long()}


def stacked(sequences: Sequence[array[int]], filler: int, left: bool = False) -> Tensor:
    """(batch, length), int64: `sequences` filled up to the longest one."""
    import numpy
    import torch

    width = max(map(len, sequences))
    rows = numpy.full((len(sequences), width), filler, dtype=numpy.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        start = width - len(sequence) if left else 0
        row[start : start + len(sequence)] = sequence
    return torch.from_numpy(rows)


def on_device(batch: dict[str, Any], model: Model) -> dict[str, Any]:
    """`batch` where `model` computes."""
    return placed(batch, model.device)
