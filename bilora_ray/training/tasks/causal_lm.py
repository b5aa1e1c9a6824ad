"""causal-lm: a model that goes on with its prompt learns the completion, or the assistant's turns of a conversation.

Of a row with more than `max_length` tokens the prompt (of a conversation: all before the assistant's last turn) loses
tokens at its left, never its leading special tokens, and the completion its end. `truncation` says how they share:

- completion-first: the completion keeps all that leaves one token of the prompt;
- prompt-first: the prompt keeps all that leaves one token of the completion;
- both: the completion gets at most three quarters of the room, or what the whole prompt leaves if that is more;
- drop: the row is left out.

A prompt to generate from loses tokens at its left in the same way, until what is written has room beside it; no
`truncation` leaves a row out for that.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.compute.generation import stops
from bilora_ray.training.compute.targets import (
    TARGETS,
    is_plain,
    mean_loss,
    target_logits,
    with_targets,
    without_cache,
    without_targets,
)
from bilora_ray.training.compute.varlen import inputs_of
from bilora_ray.training.data.chat import Template, Turn
from bilora_ray.training.data.formats import messages_of, tools_of, with_turn
from bilora_ray.training.data.sources import BEGINNING, Record
from bilora_ray.training.data.truncation import MOST_LEARNED, is_gone
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.tasks.base import Cut, Dataset, Encoded, Example, Labels, Model, Task
from bilora_ray.training.tasks.text import (
    TextRow,
    answer_lost,
    answers_lost,
    asked_row,
    check_answers,
    check_tokenizer,
    collate,
    generated,
    measure,
    metrics,
    most_new_tokens,
    predict,
    target_count,
    text_about,
    text_label_names,
    text_notes,
    text_row,
    without_special_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation that ends with the assistant's turn and does not start with it."""

    messages: Sequence[Mapping[str, Any]]
    where: str
    tools: Sequence[Any] | None = None

    @property
    def completion(self) -> str:
        """The assistant's last turn: what it says, or else calls."""
        last = self.messages[-1]
        return last["content"] or str(last.get("tool_calls", ""))


@dataclass(frozen=True, slots=True)
class Parts:
    """One example, before it is cut.

    Attributes:
        head: leading special tokens.
        prompt: the rest of the prompt.
        prompt_labels: as many.
        target: the completion.
        reference: the answer as text.
        unjudged: whether a text that is the completion would be cut before its answer.
    """

    head: list[int]
    prompt: list[int]
    prompt_labels: list[int]
    target: list[int]
    reference: str
    unjudged: Cut = Cut.NOTHING


def _row(record: Record, config: TrialConfig, names: Labels) -> TextRow | ChatRow:
    if config.chat_column is not None:
        return ChatRow(messages_of(record, config), record.where, tools_of(record, config))
    return text_row(record, config, names)


def _asked_row(record: Record, config: TrialConfig) -> TextRow | ChatRow:
    return asked_row(record, config) if config.chat_column is None else _row(with_turn(record, config), config, None)


def _examples(
    rows: Sequence[Any], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, keep_prompts: bool
) -> Iterator[Encoded]:
    check_tokenizer(config, tokenizer)
    chats = config.chat_column is not None
    parts = (_conversations if chats else _completions)(rows, config, tokenizer, keep_prompts)
    for of_row in parts:
        # What is written is judged once a row: by the last turn of a conversation, however many examples it becomes.
        yield [one for part in of_row for one in _example(part, config, keep_prompts and part is of_row[-1])]


def _example(part: Parts, config: TrialConfig, keep_prompt: bool) -> Encoded:
    room = max(config.max_length - len(part.head), 0)
    if config.truncation == "drop" and len(part.prompt) + len(part.target) > room:
        return []
    target = part.target[: max(MOST_LEARNED[config.truncation](len(part.prompt), room), 0)]
    prompt = _last(part.prompt, room - len(target))
    asked = _asked(part, config) if keep_prompt else part.prompt
    labels = _with_questions(_last(part.prompt_labels, len(prompt)))
    example = Example(
        input_ids=array("i", part.head + prompt + target),
        labels=array("i", [IGNORED] * len(part.head) + labels + target),
        prompt_ids=array("i", part.head + asked) if keep_prompt else None,
        reference=part.reference,
    )
    unjudged = part.unjudged if keep_prompt else Cut.NOTHING
    return [(example, _cut(part, prompt, target, asked, config) | unjudged)]


def _with_questions(labels: list[int]) -> list[int]:
    """`labels` without a turn at their beginning, of which what it answers was cut, and part of it perhaps."""
    start = next((place for place, label in enumerate(labels) if label == IGNORED), len(labels))
    return [IGNORED] * start + labels[start:]


def _cut(part: Parts, prompt: list[int], target: list[int], asked: list[int], config: TrialConfig) -> Cut:
    cut = Cut.COMPLETION if len(target) < len(part.target) else Cut.NOTHING
    whole, kept = len(part.prompt), min(len(prompt), len(asked) if config.predict_with_generate else len(part.prompt))
    learned = _with_questions(_last(part.prompt_labels, len(prompt)))
    if len(learned) - learned.count(IGNORED) < len(part.prompt_labels) - part.prompt_labels.count(IGNORED):
        cut |= Cut.TURNS
    if is_gone(kept, whole):
        return cut | Cut.WHOLE_PROMPT
    return cut | Cut.PROMPT if kept < whole else cut


def _asked(part: Parts, config: TrialConfig) -> list[int]:
    """Of the prompt, what is read before a text is written: at least one token, if it has any."""
    room = config.max_length - most_new_tokens(config, continues=True) - len(part.head)
    if room < 1 and config.predict_with_generate:
        raise _no_room(config)
    return _last(part.prompt, max(room, 1))


def _no_room(config: TrialConfig) -> UserError:
    both = f"both must fit into max_length ({config.max_length})"
    return UserError(f"max_new_tokens: {config.max_new_tokens} leaves no room for a prompt; {both}")


def _notes(dataset: Dataset, config: TrialConfig, validation_data: str) -> Iterator[str]:
    yield from text_notes(dataset, config, validation_data)
    if config.predict_with_generate and most_new_tokens(config, continues=True) < config.max_new_tokens:
        line = (
            f"max_new_tokens: {config.max_new_tokens} leaves no room for a prompt in max_length ({config.max_length})"
        )
        yield f"{line}; a text gets {most_new_tokens(config, continues=True)}"


def _last(values: list[int], count: int) -> list[int]:
    return values[max(len(values) - count, 0) :]


def _completions(
    rows: Sequence[TextRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, asked: bool
) -> Iterator[list[Parts]]:
    """Prompt and completion are tokenized apart, so that a prompt has the same tokens in training and generation."""
    head = _leading_special_tokens(tokenizer)
    prompts = without_special_tokens([row.prompt for row in rows], tokenizer)
    completions = without_special_tokens([row.completion for row in rows], tokenizer)
    lost = answers_lost(rows, config, tokenizer, asked, continues=True)
    for row, prompt, completion, unjudged in zip(rows, prompts, completions, lost, strict=True):
        target = [*completion, tokenizer.eos_token_id]
        yield [Parts(head, prompt, [IGNORED] * len(prompt), target, row.completion, unjudged)]


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text. What it may put after one would end the prompt before the completion."""
    text = tokenizer("a", return_special_tokens_mask=True)
    return text["input_ids"][: text["special_tokens_mask"].index(0)]


def _conversations(
    rows: Sequence[ChatRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, asked: bool
) -> Iterator[list[Parts]]:
    template = Template.of(tokenizer, config)
    for row in rows:
        turns = template.turns(row.messages, row.tools, row.where)
        parts = [_parts(turn, template) for turn in turns]
        if asked and config.predict_with_generate:
            written = template.answer(turns[-1].target[: most_new_tokens(config, continues=True)])
            parts[-1] = replace(parts[-1], unjudged=answer_lost(parts[-1].reference, written, config, row.where))
        yield parts


def _parts(turn: Turn, template: Template) -> Parts:
    """The answer is what is left of the turn where a text that is generated is cut too."""
    start = int(turn.prompt[:1] == [template.tokenizer.bos_token_id])
    head, prompt = turn.prompt[:start], turn.prompt[start:]
    return Parts(head, prompt, turn.labels[start:], turn.target, template.answer(turn.target))


def _template_notes(dataset: Dataset, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if config.chat_column is not None:
        rows = islice(dataset.train, BEGINNING)
        yield from Template.of(tokenizer, config).notes([row.messages for row in rows if isinstance(row, ChatRow)])


def _target_count(examples: Sequence[Example]) -> int:
    """Tokens that are learned and predicted from those before them: never the first one."""
    return target_count(example.labels[1:] for example in examples)


def _collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """As `collate`, with the targets: position i predicts token i + 1, and the last one nothing."""
    return with_targets(collate(examples, tokenizer), shift=1)


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """The model's own, which transformers computes in float32, with what the routers of experts may add to it."""
    if not is_plain(model):
        return model(**without_targets(batch)).loss
    return mean_loss(target_logits(model, _read(batch), batch), batch)


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    needed = without_cache(model) if is_plain(model) else {"attention_mask": batch["attention_mask"]}
    return target_logits(model, {**_read(batch), **needed}, batch), batch[TARGETS]


def _read(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a decoder reads. It sees no padding, which is at the right of what it reads, and needs no mask for that."""
    return {"input_ids": batch["input_ids"], **inputs_of(batch)}


TASK = Task(
    peft_type="CAUSAL_LM",
    row=_row,
    examples=_examples,
    collate=_collate,
    target_count=_target_count,
    loss=_loss,
    forward=_forward,
    measure=measure,
    metrics=metrics,
    predict=partial(predict, continues=True),
    asked=_asked_row,
    label_names=text_label_names,
    check=check_answers,
    about=text_about,
    notes=_notes,
    tokenizer_notes=_template_notes,
    generated=partial(generated, continues=True),
    stops=stops,
    takes_messages=True,
    continues=True,
)
