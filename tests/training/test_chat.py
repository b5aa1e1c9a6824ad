"""Conversations: the assistant's tokens, all of them and no others, whatever the template looks like."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.loading import Prepared, prepare
from bilora_ray.training.tasks.base import Dataset
from bilora_ray.training.tasks.causal_lm import ChatRow

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Earlier turns of the assistant lose their thoughts, as in the templates of some reasoning models.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|assistant|>{{ m.content[0] }}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
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


def test_a_template_that_rewrites_earlier_turns() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    assert learned(tokenizer, chat(turns("a", "thought, b"), tokenizer).train[0]) == ["thought, b"]
    with pytest.raises(UserError) as caught:
        chat(turns("a", "thought, b", "c", "d"), tokenizer)
    assert str(caught.value) == (
        "chat.jsonl, line 4: the chat template writes a turn differently when others follow, so the assistant's "
        "tokens cannot be found; use prompt_template and completion_template"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, "chat.jsonl, line 4: the chat template refuses the conversation (Roles must alternate)"),
        (None, "messages_column: the tokenizer of m has no chat template"),
    ],
)
def test_what_a_template_refuses(template: str | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        chat(turns("a", "b"), byte_tokenizer(template))
    assert str(caught.value) == message
