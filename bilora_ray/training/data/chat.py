"""Conversations: read, and as token ids of which some are the assistant's. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from bilora_ray.errors import UserError
from bilora_ray.training.data.columns import check_characters, value_of
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def messages_of(record: Record, column: str) -> list[Mapping[str, Any]]:
    """The conversation up to the assistant's last turn: nothing after it is learned or read.

    Raises:
        UserError: it is none, or the assistant answers nothing in it.
    """
    messages = value_of(record, column)
    if not isinstance(messages, list):
        raise UserError(f"{record.where}: column '{column}' must be a list of messages, not {type(messages).__name__}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{record.where}: message {number} must have a role and a content, both text")
        check_characters(message["content"], f"{record.where}: message {number}")
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise UserError(f"{record.where}: no message has the role 'assistant'")
    if spoken[0] == 0:
        raise UserError(f"{record.where}: the first message is the assistant's; there is nothing it answers")
    return messages[: spoken[-1] + 1]


def conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a conversation that ends with the assistant's turn, as the tokenizer's chat template writes it.

    Args:
        messages: the turns.
        tokenizer: has a chat template.
        where: the row's place, for errors.

    Returns:
        ids of all that comes before the last turn's text, the generation prompt included; their labels, IGNORED
        outside of the assistant's earlier turns; ids of the last turn's text and what the template ends it with.

    Raises:
        UserError: the template refuses the conversation, or writes a turn differently once others follow.
    """
    ids: list[int] = []
    labels: list[int] = []
    last: list[int] = []
    text = ""
    for before, after in _assistant_turns(messages, tokenizer, where):
        ids, labels = ids + last, labels + last
        asked = _following(ids, text, before, tokenizer)
        ids, labels = ids + asked, labels + [IGNORED] * len(asked)
        last = _following(ids, before, after, tokenizer)
        text = after
    return ids, labels, last


def _assistant_turns(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[tuple[str, str]]:
    """For each turn of the assistant the text that asks for it, and that text with the turn."""
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, where, ask=True)
        after = _render(messages[: number + 1], tokenizer, where, ask=False)
        if not before.startswith(written) or not after.startswith(before):
            raise UserError(
                f"{where}: the chat template writes a turn differently when others follow, so the assistant's "
                "tokens cannot be found; use prompt_template and completion_template"
            )
        yield before, after
        written = after


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, ask: bool) -> str:
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses the conversation ({error})") from None
    assert isinstance(text, str)
    return text


def _following(ids: list[int], text: str, longer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of `longer` that follow `ids`, the tokens of its beginning `text`.

    The whole is tokenized at once, for a tokenizer may treat a beginning differently; only where a token would
    span the end of `text`, which generation cannot produce, is the rest tokenized alone.
    """
    whole = tokenizer(longer, add_special_tokens=False, verbose=False)["input_ids"]
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return tokenizer(longer[len(text) :], add_special_tokens=False, verbose=False)["input_ids"]
