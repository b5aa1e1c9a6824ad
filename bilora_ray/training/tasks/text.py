"""Rows as token ids, not yet padded. Nothing here imports torch.

Three rules for a row with more than `max_length` tokens:
- causal-lm: the prompt (of a conversation: all before the assistant's last turn) loses tokens at its left, never
  its leading special tokens. Only a completion that is too long by itself loses its end; it leaves room for one
  token of the prompt.
- seq2seq-lm: prompt and completion each lose their end.
- sequence-classification: the text loses its end; of a pair, the longer text first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.training.data.chat import conversation
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.tasks.base import Example
from bilora_ray.training.tasks.rows import ChatRow, LabelledRow, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Parts:
    """The ids of one causal row: leading special tokens, the rest of the prompt and its labels, the completion."""

    head: list[int]
    prompt: list[int]
    prompt_labels: list[int]
    target: list[int]


def encode(
    rows: Sequence[Any], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, generate: bool
) -> Iterator[tuple[Example, bool]]:
    """The example of each row, and whether `max_length` took something from it.

    Args:
        rows: of the kind that the task has.
        config: the settings.
        tokenizer: fits the task; see `data.prepare`.
        generate: whether examples keep their prompts.

    Raises:
        UserError: a conversation that the chat template can't express.
    """
    if config.task == "sequence-classification":
        return _classification(rows, config.max_length, tokenizer)
    if config.task == "seq2seq-lm":
        return _seq2seq(rows, config.max_length, tokenizer, generate)
    parts = _conversations(rows, tokenizer) if config.messages_column is not None else _completions(rows, tokenizer)
    return _causal(rows, parts, config.max_length, generate)


def _causal(
    rows: Sequence[TextRow | ChatRow], parts: Iterator[Parts], max_length: int, generate: bool
) -> Iterator[tuple[Example, bool]]:
    for row, part in zip(rows, parts, strict=True):
        room = max(max_length - len(part.head), 0)
        target = part.target[: max(room - min(len(part.prompt), 1), 0)]
        prompt = _last(part.prompt, room - len(target))
        prompt_ids = part.head + _last(part.prompt, room) if generate else None
        example = Example(
            input_ids=array("i", part.head + prompt + target),
            labels=array("i", [IGNORED] * len(part.head) + _last(part.prompt_labels, len(prompt)) + target),
            prompt_ids=None if prompt_ids is None else array("i", prompt_ids),
            reference=row.completion,
        )
        yield example, len(prompt) + len(target) < len(part.prompt) + len(part.target)


def _last(values: list[int], count: int) -> list[int]:
    return values[max(len(values) - count, 0) :]


def _completions(rows: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[Parts]:
    """Prompt and completion are tokenized apart, so that a prompt has the same tokens in training and generation."""
    head = _leading_special_tokens(tokenizer)
    prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    completions = tokenizer([row.completion for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    for prompt, completion in zip(prompts, completions, strict=True):
        yield Parts(head, prompt, [IGNORED] * len(prompt), [*completion, tokenizer.eos_token_id])


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text. What it may put after one would end the prompt before the completion."""
    text = tokenizer("a", return_special_tokens_mask=True)
    return text["input_ids"][: text["special_tokens_mask"].index(0)]


def _conversations(rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[Parts]:
    for row in rows:
        prompt, labels, target = conversation(row.messages, tokenizer, row.where)
        start = int(prompt[:1] == [tokenizer.bos_token_id])
        yield Parts(prompt[:start], prompt[start:], labels[start:], target)


def _seq2seq(
    rows: Sequence[TextRow], max_length: int, tokenizer: PreTrainedTokenizerBase, generate: bool
) -> Iterator[tuple[Example, bool]]:
    inputs = _inputs([row.prompt for row in rows], None, max_length, tokenizer)
    completions = tokenizer([row.completion for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    for row, (ids, _, cut), completion in zip(rows, inputs, completions, strict=True):
        target = [*completion, tokenizer.eos_token_id]
        example = Example(
            input_ids=ids,
            labels=array("i", target[:max_length]),
            prompt_ids=ids if generate else None,
            reference=row.completion,
        )
        yield example, cut or len(target) > max_length


def _classification(
    rows: Sequence[LabelledRow], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, bool]]:
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    inputs = _inputs([row.text for row in rows], pairs or None, max_length, tokenizer)
    for row, (ids, token_type_ids, cut) in zip(rows, inputs, strict=True):
        yield Example(ids, array("i", [row.label]), token_type_ids=token_type_ids), cut


def _inputs(
    texts: list[str], pairs: list[str] | None, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[array[int], array[int] | None, bool]]:
    """Ids with the tokenizer's special tokens, token types of pairs, and whether max_length took something."""
    has_types = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    options: dict[str, Any] = {"return_token_type_ids": has_types, "verbose": False}
    batch = tokenizer(texts, pairs, **options)
    for row, ids in enumerate(batch["input_ids"]):
        types = batch["token_type_ids"][row] if has_types else None
        cut = len(ids) > max_length
        if cut:
            pair = None if pairs is None else pairs[row]
            shorter = tokenizer(texts[row], pair, truncation=True, max_length=max_length, **options)
            ids, types = shorter["input_ids"], shorter.get("token_type_ids")
        yield array("i", ids), None if types is None else array("i", types), cut
