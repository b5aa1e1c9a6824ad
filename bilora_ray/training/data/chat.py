"""Conversations as token ids, of which some are the assistant's, as a chat template writes them.

What the model is asked is what the template writes of the messages so far with its generation prompt, and what it
should say is how the template goes on when the assistant's turn is there. Where a template only ever adds to what it
has written, a conversation is one example, with all turns of the assistant learned. Where it writes an earlier turn
otherwise once others follow (thoughts are dropped, an end of the text moves), there is one example for each turn.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, first_line, nearest
from bilora_ray.training.data.formats import ASSISTANT, THOUGHTS, Message, is_learned
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template raises beside its own refusals: it adds what cannot be added, or looks for what is not there.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# How thoughts begin and end, where a generation prompt begins them.
THINK, THOUGHT = "<think>", "</think>"
# Texts that no template has, to see where one puts them.
ASKED, ANSWERED, TOLD, VALUE = "Zwieback?", "Quodlibet.", "Xylograph!", "hapax"
PROBE: tuple[Message, ...] = ({"role": "user", "content": ASKED}, {"role": ASSISTANT, "content": ANSWERED})
CALL = {"type": "function", "function": {"name": "quodlibet", "arguments": {"zwieback": VALUE}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "quodlibet",
        "description": TOLD,
        "parameters": {"type": "object", "properties": {"zwieback": {"type": "string", "description": ASKED}}},
    },
}


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model is asked, with what of it is learned, and what it should say: token ids.

    Attributes:
        prompt: all that comes before the turn, the generation prompt included.
        labels: as many; IGNORED but in earlier turns of the assistant that are learned with this one.
        target: the turn's text, and what the template ends it with.
    """

    prompt: list[int]
    labels: list[int]
    target: list[int]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, with what the settings tell it.

    Attributes:
        tokenizer: has the template.
        arguments: what the template is told.
        last_only: whether the assistant's last turn alone is learned.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    last_only: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: TrialConfig) -> Template:
        """UserError if there is none, or it does not read what it would be told."""
        if tokenizer.chat_template is None:
            of_model = f"the tokenizer of {config.model_name_or_path} has no chat template"
            setting = "format" if config.messages_column is None else "messages_column"
            raise UserError(f"{setting}: {of_model}; name a file in chat_template")
        arguments = dict(config.chat_template_kwargs or ())
        for key in arguments:
            words = set(re.findall(r"\w+", str(tokenizer.chat_template)))
            if key not in words:
                raise UserError(f"chat_template_kwargs: the chat template reads no '{key}'; {nearest(key, words)}")
        return cls(tokenizer, arguments, config.train_on == "last")

    def turns(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> list[Turn]:
        """A conversation that ends with a turn that is learned: one example, or one for each turn that is learned.

        Args:
            messages: the conversation.
            tools: what the assistant may call.
            where: the row's place, for errors.

        Raises:
            UserError: the template refuses it, or a turn's tokens cannot be found.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        asked = [self.render(messages[:number], tools, where, ask=True) for number in numbers]
        whole = [self.render(messages[: number + 1], tools, where, ask=False) for number in numbers]
        learned = [is_learned(messages[n]) and (n == numbers[-1] or not self.last_only) for n in numbers]
        if _only_adds(asked, whole):
            return [self._one(asked, whole, learned)]
        rows = zip(numbers, asked, whole, learned, strict=True)
        return [
            self._turn(messages[: n + 1], before, after, tools, where) for n, before, after, wanted in rows if wanted
        ]

    def _one(self, asked: Sequence[str], whole: Sequence[str], learned: Sequence[bool]) -> Turn:
        ids: list[int] = []
        labels: list[int] = []
        target: list[int] = []
        text, earlier = "", True
        for before, after, wanted in zip(asked, whole, learned, strict=True):
            ids, labels = ids + target, labels + (target if earlier else [IGNORED] * len(target))
            question = self._following(ids, text, before)
            ids, labels = ids + question, labels + [IGNORED] * len(question)
            target = self._following(ids, before, after)
            text, earlier = after, wanted
        return Turn(ids, labels, target)

    def _turn(
        self, messages: Sequence[Message], asked: str, whole: str, tools: Sequence[Any] | None, where: str
    ) -> Turn:
        said = _said(asked, whole, messages[-1])
        if said is None:
            # What comes before the turn may be rewritten too, as another turn of the assistant is.
            header = asked.removeprefix(self.render(messages[:-1], tools, where, ask=False))
            said = _behind(header, whole, messages[-1], where)
        prompt = self._following([], "", asked)
        return Turn(prompt, [IGNORED] * len(prompt), self._following(prompt, asked, asked + said))

    def _following(self, ids: list[int], text: str, longer: str) -> list[int]:
        """The tokens of `longer` that follow `ids`, the tokens of its beginning `text`.

        The whole is tokenized at once, for a tokenizer may treat a beginning differently; only where a token would
        span the end of `text`, which generation cannot produce, is the rest tokenized alone.
        """
        whole = self._ids(longer)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self._ids(longer[len(text) :])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str, ask: bool) -> str:
        """The text of `messages`, with the generation prompt if it should `ask`. UserError if that is refused."""
        if tools and not self._writes_tools:
            raise UserError(f"{where}: the chat template writes no tools")
        if not self._writes_calls and any("tool_calls" in message for message in messages):
            raise UserError(f"{where}: the chat template writes no tool calls")
        try:
            return self._text([self._in_shape(message) for message in messages], tools, ask)
        except TemplateSyntaxError as error:
            raise UserError(f"chat_template: line {error.lineno}: {error.message}") from None
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{where}: the chat template refuses the conversation ({first_line(error)})") from None

    def _text(self, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=ask,
            **self.arguments,
        )
        assert isinstance(text, str)
        return text

    def _in_shape(self, message: Message) -> Message:
        """The message as this template reads one."""
        shaped = dict(message)
        if self._reads_parts:
            shaped["content"] = [{"type": "text", "text": message["content"]}]
        if THOUGHTS[0] in message:
            shaped[self._thoughts or THOUGHTS[0]] = shaped.pop(THOUGHTS[0])
        if "tool_calls" in message and self._reads_json:
            shaped["tool_calls"] = [_with_json(call) for call in message["tool_calls"]]
        return shaped

    def _tried(self, *messages: Message, tools: Sequence[Any] | None = None, ask: bool = False) -> str:
        """The text of `messages`, or none where the template refuses them."""
        try:
            return self._text(messages, tools, ask)
        except TEMPLATE_ERRORS:
            return ""

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether contents must be lists of parts, as in templates of models that see: a text would not be written."""
        parts = {**PROBE[0], "content": [{"type": "text", "text": ASKED}]}
        return ASKED not in self._tried(PROBE[0], ask=True) and ASKED in self._tried(parts, ask=True)

    @cached_property
    def _thoughts(self) -> str | None:
        """What the template calls the thoughts of a turn; None: it writes none."""
        return next((key for key in THOUGHTS if TOLD in self._tried(PROBE[0], {**PROBE[1], key: TOLD})), None)

    @cached_property
    def _reads_json(self) -> bool:
        """Whether the arguments of a call must be JSON text: a mapping, as transformers has it, would be refused."""
        return VALUE not in self._calling(CALL) and VALUE in self._calling(_with_json(CALL))

    @cached_property
    def _writes_calls(self) -> bool:
        return VALUE in self._calling(_with_json(CALL) if self._reads_json else CALL)

    def _calling(self, call: Mapping[str, Any]) -> str:
        return self._tried(PROBE[0], {"role": ASSISTANT, "content": "", "tool_calls": [call]}, tools=[TOOL])

    @cached_property
    def _writes_tools(self) -> bool:
        return self._tried(PROBE[0], tools=[TOOL], ask=True) != self._tried(PROBE[0], ask=True)

    @cached_property
    def _probed(self) -> tuple[str, str]:
        """What is asked of a short conversation, and the whole of it; the latter is empty without the answer."""
        messages = [self._in_shape(message) for message in PROBE]
        whole = self._tried(*messages)
        return self._tried(*messages[:1], ask=True), whole if ANSWERED in whole else ""

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that the template writes after a turn of the assistant: the first of them ends it."""
        return tuple(self._own(self._probed[1].rpartition(ANSWERED)[2]))

    @cached_property
    def opening(self) -> int | None:
        """The last token of its own that the template writes after its generation prompt, before the answer."""
        said = _said(*self._probed, PROBE[1]) or ""
        return next(reversed(self._own(said.partition(ANSWERED)[0])), None)

    def _own(self, text: str) -> list[int]:
        """The tokens of `text` that stand for themselves, as those of templates do."""
        own = self.tokenizer.added_tokens_decoder
        return [token for token in self._ids(text) if token in own]

    @cached_property
    def _special(self) -> frozenset[int]:
        return all_special(self.tokenizer)

    @cached_property
    def _special_in_answers(self) -> frozenset[int]:
        """The special tokens that neither the template writes around turns nor the tokenizer around texts."""
        around = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        return self._special - around - set(self._own("".join(self._probed)))

    def answer(self, ids: Sequence[int], kept: AbstractSet[int] | None = None) -> str:
        """Of what a model wrote, the answer: without thoughts or names of channels before it, and what ends it.

        Args:
            ids: what it wrote, or should write.
            kept: the special tokens that are a part of answers, as `<yes>` may be; None: all but the template's.
        """
        ids = list(ids)
        start = len(ids) - ids[::-1].index(self.opening) if self.opening in ids else 0
        end = next((place for place in range(start, len(ids)) if ids[place] in self.ends), len(ids))
        said, kept = ids[start:end], self._special_in_answers if kept is None else kept
        if kept.isdisjoint(said):
            text = str(self.tokenizer.decode(said, skip_special_tokens=True))
        else:
            text = str(self.tokenizer.decode([one for one in said if one not in self._special or one in kept]))
        return text.lstrip("\n") if start else text

    def notes(self, chats: Sequence[Sequence[Message]]) -> Iterator[str]:
        """What is seldom meant of a template, and of what it leaves out of `chats`."""
        asked, whole = self._probed
        if whole and not self.ends:
            yield (
                "chat_template: ends the assistant's turn with no token of its own, so that no end is learned, and a "
                "text goes on to max_new_tokens"
            )
        begun = _begun(asked, whole) if whole else ""
        if begun:
            yield (
                f"chat_template: asks with {begun!r}, which a whole conversation does not have; turns are learned as "
                "they have to go on from there"
            )
        messages = [message for chat in chats for message in chat]
        if any(message["role"] == "system" for message in messages) and self._drops(
            {"role": "system", "content": TOLD}, *PROBE
        ):
            yield "chat_template: leaves the system turns out"
        if THINK in begun:  # then thoughts are put where they are asked for
            return
        if self._thoughts is None and any(THOUGHTS[0] in message for message in messages):
            yield f"chat_template: leaves the {THOUGHTS[0]} of turns out"
        said: Message = {"role": ASSISTANT, "content": f"{THINK}{TOLD}{THOUGHT}{ANSWERED}"}
        if any(THOUGHT in message["content"] for message in messages) and self._drops(PROBE[0], said):
            yield f"chat_template: leaves the thoughts before {THOUGHT} out of contents"

    def _drops(self, *messages: Message) -> bool:
        """Whether TOLD, which is in one of `messages`, is not in what is written of them."""
        text = self._tried(*map(self._in_shape, messages))
        return bool(text) and TOLD not in text


def all_special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special tokens of a tokenizer, those that were added to it too."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def use_template(tokenizer: PreTrainedTokenizerBase, config: TrialConfig) -> None:
    """Give the tokenizer the settings' chat template, if they name one. UserError if its file can't be read."""
    if config.chat_template is None:
        return
    try:
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template: cannot read {config.chat_template} ({first_line(error)})") from None


def _only_adds(asked: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether each text begins with the one before it."""
    texts = [text for pair in zip(asked, whole, strict=True) for text in pair]
    return all(longer.startswith(text) for text, longer in pairwise(texts))


def _shared(text: str, other: str) -> int:
    """With how many characters both begin."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))


def _begun(asked: str, whole: str) -> str:
    """What the generation prompt has that `whole` has not."""
    if whole.startswith(asked):
        return ""
    _, think, begun = asked.rpartition(THINK)
    return think + begun if think and THOUGHT not in begun else asked[_shared(asked, whole) :]


def _said(asked: str, whole: str, message: Message) -> str | None:
    """How the assistant's turn goes on after `asked`, the generation prompt; `whole` is all with the turn.

    As a rule it is the rest of `whole`. A generation prompt may begin thoughts that `whole` has not, or has closed:
    then the turn ends them, after its own if it has any, which is what a model has to write there when it is served.
    None: there is something else that `whole` goes without.
    """
    if whole.startswith(asked):
        return whole[len(asked) :]
    head, think, begun = asked.rpartition(THINK)
    if not think or THOUGHT in begun or not whole.startswith(head):
        return None
    rest = whole[len(head) :]
    if rest.startswith(THINK):
        return rest.removeprefix(THINK).removeprefix(begun)
    answer = rest.lstrip("\n")
    return f"{_thoughts_of(message)}\n{THOUGHT}\n\n{answer}"


def _behind(header: str, whole: str, message: Message, where: str) -> str:
    """What `whole` has behind the header of its last turn, with the space at its end or without.

    Raises:
        UserError: that is not the turn.
    """
    content = message["content"].strip()
    for written in filter(None, (header, header.rstrip())):
        _, found, said = whole.rpartition(written)
        if found and content and content in said:
            return said
    cure = "name another one in chat_template"
    if THOUGHTS[0] in message:
        cure = "its thoughts may want chat_template_kwargs: {enable_thinking: true}"
    raise UserError(f"{where}: the chat template begins this turn otherwise than its generation prompt does; {cure}")


def _thoughts_of(message: Message) -> str:
    thoughts, closed, _ = message["content"].rpartition(THOUGHT)
    own = thoughts.partition(THINK)[2] or thoughts if closed else message.get(THOUGHTS[0], "")
    return str(own).strip("\n")


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:

    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
