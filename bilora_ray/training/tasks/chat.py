"""Conversations as token ids: which tokens are the assistant's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from bilora_ray.errors import UserError
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
