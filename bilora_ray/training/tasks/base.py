"""What all tasks share: the example, and how examples become tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilora_ray.config import Task
from bilora_ray.training.metrics import IGNORED


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenized and not padded. Ids are 32-bit integers.

    Attributes:
        input_ids: (length,).
        labels: causal-lm: (length,), IGNORED where nothing is learned; seq2seq-lm: (target length,), the
            completion and the end of sequence; sequence-classification: (1,), the label index.
        prompt_ids: (prompt length,), what generation starts from; None where nothing is generated.
        token_type_ids: (length,), 1 on the second text of a pair, for models that have such an input.
        reference: text of the completion; empty for sequence-classification.
    """

    input_ids: array[int]
    labels: array[int]
    prompt_ids: array[int] | None = None
    token_type_ids: array[int] | None = None
    reference: str = ""


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
