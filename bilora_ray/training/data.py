"""The examples of a trial, which of them come together, in which order, and as which tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from bilora_ray.config import Task, TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.examples import Example, encode
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.order import shuffled
from bilora_ray.training.rows import Dataset, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Rows tokenized at one time: enough to be fast, few enough that Python's int lists stay small.
CHUNK = 1000


@dataclass(frozen=True)
class Truncation:
    """What `max_length` did to one split.

    Attributes:
        rows: rows before.
        cut: rows that lost tokens and are still used.
        dropped: rows left out because they have no token to predict.
    """

    rows: int
    cut: int
    dropped: int


@dataclass(frozen=True)
class Prepared:
    """The examples of a trial, and what truncation did, by split: `train` and `validation`."""

    train: Sequence[Example]
    validation: Sequence[Example]
    truncation: dict[str, Truncation]


def prepare(dataset: Dataset, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Tokenize all rows; `examples` says what happens to those longer than `max_length`.

    Validation examples keep their prompts, from which a text can be generated.

    Raises:
        UserError: the tokenizer lacks what the task needs, or a row or a split has nothing to predict.
    """
    if config.task != "sequence-classification" and tokenizer.eos_token_id is None:
        raise UserError(f"model_name_or_path: the tokenizer of {config.model_name_or_path} has no end of sequence")
    if config.messages_column is not None and tokenizer.chat_template is None:
        raise UserError(f"messages_column: the tokenizer of {config.model_name_or_path} has no chat template")
    train, train_truncation = _encoded(dataset.train, config, tokenizer, "train")
    validation, validation_truncation = _encoded(dataset.validation, config, tokenizer, "validation")
    return Prepared(train, validation, {"train": train_truncation, "validation": validation_truncation})


def _encoded(
    rows: Sequence[Row], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, split: str
) -> tuple[list[Example], Truncation]:
    generate = split == "validation" and config.task != "sequence-classification"
    examples, cut = [], 0
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row, (example, was_cut) in zip(chunk, encode(chunk, config, tokenizer, generate), strict=True):
            if not example.input_ids or (config.predict_with_generate and generate and not example.prompt_ids):
                raise UserError(f"{row.where}: there is no text to read")
            # A causal model predicts a token from those before it, so never the first one.
            if config.task == "causal-lm" and all(label == IGNORED for label in example.labels[1:]):
                continue
            examples.append(example)
            cut += was_cut
    if not examples:
        raise UserError(f"{split}_data: no row has a token to predict")
    return examples, Truncation(len(rows), cut, len(rows) - len(examples))


@lru_cache(maxsize=1)
def train_batches(num_rows: int, batch_size: int, seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    """Row indices of each batch of one epoch; every row once, the last batch may be smaller.

    A pure function of its arguments, so that training resumes exactly by counting the batches it has done.
    """
    order = shuffled(num_rows, "epoch", seed, epoch)
    return tuple(tuple(order[start : start + batch_size]) for start in range(0, num_rows, batch_size))


def eval_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices of batches of like `lengths`, longest first: little padding, and too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_row_order(batches: Sequence[Sequence[int]], outputs: Iterable[T]) -> list[T]:
    """`outputs`, one for each row in the order of `batches`, put back into the order of the rows."""
    rows = [row for batch in batches for row in batch]
    return [output for _, output in sorted(zip(rows, outputs, strict=True), key=lambda pair: pair[0])]


def collate(examples: Sequence[Example], task: Task, pad_token_id: int) -> dict[str, Tensor]:
    """A batch to compute the loss of, int64 and padded at the right.

    Returns:
        input_ids and attention_mask (batch, length); labels (batch, length), of seq2seq-lm (batch, target length)
        and of sequence-classification (batch,), padded with IGNORED; token_type_ids (batch, length) of pairs.
    """
    batch = _padded([example.input_ids for example in examples], pad_token_id)
    batch["labels"] = _stacked([example.labels for example in examples], IGNORED)
    if task == "sequence-classification":
        batch["labels"] = batch["labels"][:, 0]
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if types:
        batch["token_type_ids"] = _stacked(types, 0)
    return batch


def collate_prompts(examples: Sequence[Example], task: Task, pad_token_id: int) -> dict[str, Tensor]:
    """A batch to generate from: input_ids and attention_mask (batch, length), int64.

    A causal model goes on after the last position, so its prompts are padded at the left.
    """
    prompts = [example.prompt_ids for example in examples if example.prompt_ids is not None]
    assert len(prompts) == len(examples), "only validation examples have prompts"
    return _padded(prompts, pad_token_id, left=task == "causal-lm")


def target_count(examples: Sequence[Example], task: Task) -> int:
    """How many predictions the mean loss over `examples` is of: target tokens, or rows of a classification."""
    if task == "sequence-classification":
        return len(examples)
    # A causal model predicts a token from those before it, so never the first one.
    targets = [example.labels[1:] if task == "causal-lm" else example.labels for example in examples]
    return sum(len(labels) - labels.count(IGNORED) for labels in targets)


def _padded(sequences: Sequence[array[int]], pad_token_id: int, left: bool = False) -> dict[str, Tensor]:
    # The mask goes by length: the padding token is often the end of sequence, which is a real token too.
    ones = [array("i", [1]) * len(sequence) for sequence in sequences]
    return {"input_ids": _stacked(sequences, pad_token_id, left), "attention_mask": _stacked(ones, 0, left)}


def _stacked(sequences: Sequence[array[int]], filler: int, left: bool = False) -> Tensor:
    width = max(len(sequence) for sequence in sequences)
    rows = []
    for sequence in sequences:
        padding = array("i", [filler]) * (width - len(sequence))
        rows.append((padding + sequence if left else sequence + padding).tolist())
    return torch.tensor(rows, dtype=torch.int64)
