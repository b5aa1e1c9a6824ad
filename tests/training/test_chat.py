"""Conversations: the assistant's tokens, all of them and no others, whatever the template looks like."""

import ast
import site
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training.chat_cases import (
    CASES,
    CHANNELS,
    ENDLESS,
    ENDS_THE_TEXT,
    MERGES_SYSTEM,
    OPENS,
    OPENS_CLOSELY,
    PARTS,
    PLACE,
    PLAIN,
    SPACED,
    THINKS_LAST,
    TWO,
    Case,
    messages,
    tokenizer_of,
)
from transformers import PreTrainedTokenizerFast

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.compute.generation import ends, stops
from bilora_ray.training.data.chat import Template, Turn
from bilora_ray.training.data.formats import format_note, in_format
from bilora_ray.training.data.sources import Record
from bilora_ray.training.loading import Prepared, prepare
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset
from bilora_ray.training.tasks.causal_lm import ChatRow

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{{ raise_exception('Roles must alternate') }}"


def byte_tokenizer(template: str | None, merges: tuple[str, ...] = (), **special: Any) -> PreTrainedTokenizerFast:
    """One token a byte, but for `merges` of two bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *merges])}
    backend = Tokenizer(models.BPE(vocabulary, [(merge[0], merge[1]) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **special)
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def chat(messages: list[dict[str, str]], tokenizer: Any, **settings: Any) -> Prepared:
    row = ChatRow(messages, "chat.jsonl, line 4")
    config = TrialConfig(
        model_name_or_path="m",
        task="causal-lm",
        train_data="d",
        messages_column="chat",
        predict_with_generate=True,
        **settings,
    )
    return prepare(Dataset([row], [row], None, {}), config, tokenizer)


def learned(tokenizer: Any, example: Any) -> list[str]:
    """The pieces of text that are learned."""
    pieces: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (turns("hi", "ho"), ["ho<|end|>\n"]),
        (turns("a", "b", "c", "d", system="s"), ["b<|end|>\n", "d<|end|>\n"]),
        (turns("é\u2028", "<|user|>x"), ["<|user|>x<|end|>\n"]),
        (turns("a", ""), ["<|end|>\n"]),
        ([*turns("a", "b"), {"role": "assistant", "content": "c"}], ["b<|end|>\n", "c<|end|>\n"]),
    ],
)
def test_every_assistant_turn_is_learned(messages: list[dict[str, str]], expected: list[str]) -> None:
    tokenizer = byte_tokenizer(CHATML)
    example = chat(messages, tokenizer).validation[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids.tolist()) == whole
    assert learned(tokenizer, example) == expected
    assert example.prompt_ids is not None
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert example.prompt_ids.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example.reference == messages[-1]["content"]


def test_a_token_never_spans_the_start_of_a_turn() -> None:
    tokenizer = byte_tokenizer(CHATML, merges=(">o", "ho"))
    messages = turns("a", "oh", "b", "ho")
    example = chat(messages, tokenizer).validation[0]
    assert learned(tokenizer, example) == ["oh<|end|>\n", "ho<|end|>\n"]
    assert tokenizer.convert_tokens_to_ids("ho") in example.labels
    assert tokenizer.convert_tokens_to_ids(">o") not in example.input_ids


def test_a_long_conversation_loses_its_beginning_but_not_its_first_special_token() -> None:
    tokenizer = byte_tokenizer("^" + CHATML, bos_token="^")
    messages = turns("first", "1", "second", "2")
    data = chat(messages, tokenizer, max_length=30, max_new_tokens=8)
    example = data.validation[0]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == whole[:1] + whole[-29:]
    assert learned(tokenizer, example) == ["2<|end|>\n"]
    assert (data.truncation["train"].cut, data.truncation["train"].dropped) == (1, 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, "chat.jsonl, line 4: the chat template refuses the conversation (Roles must alternate)"),
        (None, "messages_column: the tokenizer of m has no chat template; name a file in chat_template"),
    ],
)
def test_what_a_template_refuses(template: str | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        chat(turns("a", "b"), byte_tokenizer(template))
    assert str(caught.value) == message


def row_of(case: Case) -> tuple[Dataset, TrialConfig]:
    """The row of a case, as it is read, and its settings."""
    config = TrialConfig(model_name_or_path="m", task="causal-lm", train_data="d", **case.settings)
    record = Record(case.row, PLACE)
    found = in_format(config, [record])
    row = TASKS["causal-lm"].row(record, found, None)
    return Dataset([row], [row], None, {}, format=found.format), config


def eos_of(case: Case) -> str:
    return "<eos>" if case.template in (ENDS_THE_TEXT, ENDLESS, CHANNELS) else "[end]"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_becomes_of_a_chat(case: Case) -> None:
    tokenizer = tokenizer_of(case.template, eos_of(case))
    if case.refused:
        with pytest.raises(UserError) as caught:
            prepare(*row_of(case), tokenizer)
        assert [str(caught.value)] == list(case.says)
        return
    rows, config = row_of(case)
    data = prepare(rows, config, tokenizer)
    assert [learned(tokenizer, example) for example in data.train] == list(case.learned)
    assert [*format_note(config, rows.format), *data.notes] == list(case.says)


CHATS = [messages(*TWO), messages("hi", "ho", "a", "b", "c", "d", system="be"), messages(*TWO, reasoning_content="hm")]
TEMPLATES = {
    "plain": PLAIN,
    "thinks last": THINKS_LAST,
    "ends the text": ENDS_THE_TEXT,
    "channels": CHANNELS,
    "endless": ENDLESS,
    "merges the system turn": MERGES_SYSTEM,
    "parts": PARTS,
}


def rendered(tokenizer: Any, template: Template, chat: list[dict[str, Any]], ask: bool) -> list[int]:
    return tokenizer(template.render(chat, None, "W", ask=ask), add_special_tokens=False)["input_ids"]


def by_turn(template: Template, chat: list[dict[str, Any]]) -> list[tuple[int, Turn]]:
    """Where the turn that each example ends with stands in the conversation, and the example."""
    numbers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    turns = template.turns(chat, None, "W")
    assert len(turns) in (1, len(numbers))
    return list(zip(numbers[-len(turns) :], turns, strict=True))


@pytest.mark.parametrize("chat", CHATS, ids=["two", "three with a system turn", "thoughts"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_is_the_conversation_up_to_its_turn_token_by_token(name: str, chat: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    template = Template(tokenizer, {}, last_only=False)
    for number, turn in by_turn(template, chat):
        assert turn.prompt == rendered(tokenizer, template, chat[:number], ask=True)
        assert turn.prompt + turn.target == rendered(tokenizer, template, chat[: number + 1], ask=False)


@pytest.mark.parametrize("chat", CHATS, ids=["two", "three with a system turn", "thoughts"])
@pytest.mark.parametrize("opens", [OPENS, OPENS_CLOSELY, SPACED], ids=["opens", "opens closely", "spaced"])
def test_a_prompt_is_what_is_asked_where_a_whole_conversation_has_less(opens: str, chat: list[dict[str, Any]]) -> None:
    """The turn begins behind all of the generation prompt, and ends as the whole conversation does."""
    tokenizer = tokenizer_of(opens)
    template = Template(tokenizer, {}, last_only=False)
    for number, turn in by_turn(template, chat):
        assert turn.prompt == rendered(tokenizer, template, chat[:number], ask=True)
        text = tokenizer.decode(turn.prompt + turn.target)
        assert text.count("<think>", text.rindex("[a]")) == text.count("</think>", text.rindex("[a]")) <= 1
        assert text.endswith(f"{chat[number]['content']}[end]")


def test_a_special_token_that_is_the_answer_is_judged() -> None:
    tokenizer = tokenizer_of(PLAIN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<yes>", "<no>"]})
    template = Template(tokenizer, {}, last_only=False)
    for said in ("<yes>", "<no>", "it is <no>"):
        [turn] = template.turns(messages("hi", said), None, "W")
        assert template.answer(turn.target) == said


@pytest.mark.parametrize("template", [THINKS_LAST, OPENS, CHANNELS, PLAIN])
def test_an_answer_is_judged_without_its_thoughts(template: str) -> None:
    """A model that writes just what it learned, or has thought before, is right."""
    tokenizer = tokenizer_of(template, eos="<eos>")
    found = Template(tokenizer, {}, last_only=False)
    for chat in (messages("hi", "ho"), messages("hi", "ho", reasoning_content="hm")):
        (turn,) = found.turns(chat, None, "W")
        assert found.answer(turn.target) == "ho"


def test_the_last_turn_is_judged_however_many_examples_a_chat_becomes() -> None:
    config = TrialConfig(
        model_name_or_path="m", task="causal-lm", train_data="d", messages_column="m", predict_with_generate=True
    )
    rows = [ChatRow(messages(*TWO), "W")]
    kept = prepare(Dataset(rows, rows, None, {}), config, tokenizer_of(THINKS_LAST)).validation
    assert [(example.prompt_ids is None, example.reference) for example in kept] == [(True, "ho"), (False, "b")]


def test_what_a_template_is_told_reaches_it() -> None:
    told = "{{ style }}" + PLAIN
    config = coerced(chat_template_kwargs={"style": "!"})
    (turn,) = Template.of(tokenizer_of(told), config).turns(messages("hi", "ho"), None, "W")
    assert tokenizer_of(told).decode(turn.prompt) == "![u]hi[end][a]"


def coerced(**settings: Any) -> TrialConfig:
    return TrialConfig(model_name_or_path="m", task="causal-lm", train_data="d", messages_column="m", **settings)


@pytest.mark.parametrize(
    ("template", "eos", "found"),
    [(PLAIN, "[end]", ["[end]"]), (ENDS_THE_TEXT, "<eos>", ["[end]", "<eos>"]), (ENDLESS, "<eos>", [])],
)
def test_what_ends_a_turn(template: str, eos: str, found: list[str]) -> None:
    tokenizer = tokenizer_of(template, eos)
    assert tokenizer.convert_ids_to_tokens(list(Template(tokenizer, {}, last_only=False).ends)) == found


def generating(eos: int | list[int] | None) -> Any:
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))


def test_a_text_ends_at_the_end_of_a_turn_that_the_model_does_not_know() -> None:
    chats = coerced()
    plain = chats.model_copy(update={"messages_column": None})
    tokenizer = tokenizer_of(PLAIN, eos="<eos>")
    eos, end = tokenizer.convert_tokens_to_ids(["<eos>", "[end]"])
    assert ends(generating(eos), tokenizer, chats) == sorted([eos, end])
    assert stops(generating(eos), tokenizer, chats) == sorted([eos, end])
    assert stops(generating([eos, end]), tokenizer, chats) == []
    assert stops(generating(eos), tokenizer, plain) == []
    assert stops(generating(None), tokenizer, plain) == [eos]
    assert stops(generating(eos), tokenizer_of(ENDS_THE_TEXT, "<eos>"), chats) == []


def installed_templates() -> Iterator[tuple[str, str]]:
    """The chat templates that installed packages carry, in files and in the code of transformers' models."""
    for folder in map(Path, site.getsitepackages()):
        for path in folder.rglob("*.jinja"):
            if "add_generation_prompt" in (text := path.read_text(encoding="utf-8")):
                yield str(path), text
        for path in (folder / "transformers" / "models").rglob("*.py"):
            if "add_generation_prompt %}" in (code := path.read_text(encoding="utf-8")):
                texts = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
                yield from ((str(path), text) for text in texts if "add_generation_prompt %}" in str(text))


@pytest.mark.slow
def test_templates_of_installed_packages() -> None:
    """Each is exact for a conversation, or refuses it: no system turns, or tools of its own."""
    found = 0
    for name, text in installed_templates():
        tokenizer = tokenizer_of(text, eos="<eos>")
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        template = Template(tokenizer, {}, last_only=False)
        for chat in CHATS[:2]:
            turns = []
            with suppress(UserError):
                turns = by_turn(template, chat)
            for number, turn in turns:
                asked, whole = (template.render(chat[:n], None, "W", n == number) for n in (number, number + 1))
                assert turn.prompt == tokenizer(asked, add_special_tokens=False)["input_ids"], name
                if whole.startswith(asked):
                    written = turn.prompt + turn.target
                    assert written == tokenizer(whole, add_special_tokens=False)["input_ids"], name
                assert chat[number]["content"] in tokenizer.decode(turn.target), name
            found += len(turns)
    assert found


def test_only_the_turn_that_is_judged_needs_an_answer() -> None:
    config = coerced(predict_with_generate=True, answer_pattern="# (.+)")
    talk, judged = ChatRow(messages("hi", "ho"), "T"), ChatRow(messages("hi", "ho", "a", "it is # b"), "V")
    rows = Dataset([talk], [judged], None, {})
    for template in (PLAIN, THINKS_LAST):
        kept = prepare(rows, config, tokenizer_of(template)).validation
        assert [example.reference for example in kept if example.prompt_ids is not None] == ["it is # b"]
    with pytest.raises(UserError, match="T: answer_pattern matches nothing"):
        prepare(Dataset([talk], [talk], None, {}), config, tokenizer_of(PLAIN))


def test_a_turn_whose_question_is_cut_is_not_learned() -> None:
    row = ChatRow(messages("hi", "ho" * 9, "a", "b"), "W")
    tokenizer = tokenizer_of(PLAIN)
    whole = len(prepare(Dataset([row], [row], None, {}), coerced(), tokenizer).train[0].input_ids)
    for lost, turns in ((0, 2), (2, 2), (5, 1), (9, 1), (whole - 8, 1)):
        data = prepare(Dataset([row], [row], None, {}), coerced(max_length=whole - lost), tokenizer)
        assert len(learned(tokenizer, data.train[0])) == turns
        assert data.truncation["train"].turns_cut == 2 - turns
    assert [note for note in data.truncation["train"].notes(coerced().model_dump()) if "earlier turns" in note] == [
        "max_length: 1 of 1 rows (100%) lose earlier turns of the assistant, which teach nothing then; raise it"
    ]
