"""Questions without answers are read as those with answers, and texts are drawn as often as they are likely."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import Tiny
from training.chat_cases import (
    CHANNELS,
    ENDLESS,
    ENDS_THE_TEXT,
    MERGES_SYSTEM,
    OPENS,
    OPENS_CLOSELY,
    PARTS,
    PLAIN,
    THINKS_LAST,
    TOOLS,
    messages,
    tokenizer_of,
)
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.sources import Record
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.model import load_tokenizer
from bilora_ray.training.prediction.questions import asking, question, record_of
from bilora_ray.training.prediction.sampling import Sampling
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks import text as texts
from bilora_ray.training.tasks.base import Example

CONFIG: dict[str, Any] = {"model_name_or_path": "m", "train_data": "d"}
CHATS = [
    messages("What is 2 + 2?", "4."),
    messages("hi", "ho", "a", "b", "c", "d", system="be brief"),
    messages("What is 2 + 2?", "4.", reasoning_content="hm"),
]
TEMPLATES = [PLAIN, THINKS_LAST, OPENS, OPENS_CLOSELY, ENDS_THE_TEXT, CHANNELS, ENDLESS, MERGES_SYSTEM, PARTS, TOOLS]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_asked_as_it_is_evaluated(template: str, chat: list[dict[str, Any]]) -> None:
    eos = "<eos>" if template in (ENDS_THE_TEXT, ENDLESS, CHANNELS) else "[end]"
    tokenizer = tokenizer_of(template, eos)
    config = TrialConfig(task="causal-lm", format="openai", **CONFIG)
    task = TASKS["causal-lm"]

    def prompt(row: Any, config: TrialConfig) -> array[int]:
        ((*_, (example, _)),) = task.examples([row], config, tokenizer, True)
        assert example.prompt_ids
        return example.prompt_ids

    evaluated = prompt(task.row(Record({"messages": chat}, "W"), config, None), config)
    own = asking(config)
    for asked in (chat, chat[:-1]):
        for column in (asked, json.dumps(asked)):  # a table has lists as text
            assert prompt(question(Record({"messages": column}, "W"), own), own) == evaluated


def test_the_turns_of_sharegpt_are_asked_too() -> None:
    config = asking(TrialConfig(task="causal-lm", format="sharegpt", system_prompt="be brief", **CONFIG))
    said = [{"from": "human", "value": "hi"}]
    row: Any = question(Record({"conversations": said}, "W"), config)
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    answered: Any = question(Record({"conversations": [*said, {"from": "gpt", "value": "ho"}]}, "W"), config)
    assert answered.messages[:-1] == row.messages[:-1]
    assert answered.messages[-1]["content"] == "ho"
    typed: Any = question(record_of("hi", config), config)
    assert typed.messages == row.messages


def test_a_prompt_of_alpaca_is_its_instruction() -> None:
    config = asking(TrialConfig(task="causal-lm", format="alpaca", **CONFIG))
    row: Any = question(record_of("Add 2 and 2.", config), config)
    assert "### Instruction:\nAdd 2 and 2.\n\n### Response:" in row.prompt
    with_input: Any = question(Record({"instruction": "Add", "input": "2, 2"}, "W"), config)
    assert "### Input:\n2, 2" in with_input.prompt


def test_the_labels_of_rows_are_not_read() -> None:
    config = asking(
        TrialConfig(task="sequence-classification", label_names=("bad", "good"), text_pair_column="other", **CONFIG)
    )
    columns = {"text": "a", "other": "b"}
    expected = question(Record(columns, "W"), config)
    for label in ("good", "unheard of", -1, None, [], float("nan")):
        assert question(Record({**columns, "label": label}, "W"), config) == expected
    assert question(record_of('{"text": "a", "other": "b"}', config), config) == question(
        Record(columns, "the prompt"), config
    )
    nameless = config.model_copy(update={"label_names": None})
    with pytest.raises(UserError, match="label_names: the adapter does not know them"):
        question(Record(columns, "W"), nameless)


@pytest.mark.parametrize(("max_length", "max_new_tokens"), [(64, 8), (64, 63), (512, 64)])
@pytest.mark.parametrize("asked", [None, 1, 100])
def test_a_prompt_keeps_its_tokens_however_long_the_text_may_be(
    max_length: int, max_new_tokens: int, asked: int | None
) -> None:
    lengths = {"max_length": max_length, "max_new_tokens": max_new_tokens}
    config = TrialConfig(task="causal-lm", predict_with_generate=True, **lengths, **CONFIG)
    own, before = asking(config, asked), texts.most_new_tokens(config, continues=True)
    assert texts.most_new_tokens(own, continues=True) == own.max_new_tokens == (asked or before)
    assert own.max_length - own.max_new_tokens == max_length - before


def test_special_tokens_are_a_part_of_answers_that_nobody_knows(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config("causal-lm")
    tokenizer = load_tokenizer(config)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<yes>", "<no>"]})
    yes, no = tokenizer.convert_tokens_to_ids(["<yes>", "<no>"])
    red = tokenizer("red", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(texts, "greedy", lambda *_: None)
    monkeypatch.setattr(texts, "write", lambda *_, **__: [[yes, *red, tokenizer.eos_token_id], [no]])

    def said(*references: str) -> list[str]:
        examples = [Example(array("i"), array("i"), array("i", [5]), reference=text) for text in references]
        found = texts.predict(None, examples, config, tokenizer, None, ALONE, continues=True)
        return [one.prediction for one in found]

    assert said("", "") == ["<yes>red", "<no>"]
    assert said("<no>", "") == ["red", "<no>"]  # as answers are judged that are known


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    rows = 4_000
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        scores = TemperatureLogitsWarper(temperature)(None, logits[None])
        expected = TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]
        drawn = Sampling(temperature, top_p, 0, 2).of(range(rows))
        for _ in range(2):
            left = drawn(torch.zeros(rows, 1).long(), logits.expand(rows, -1))
            assert ((left == 0).sum(-1) == 1).all()
            shares = (left == 0).float().mean(0)
            assert shares == pytest.approx(expected, abs=0.035)
            assert (shares[expected == 0] == 0).all()


def test_a_row_is_drawn_alike_whichever_rows_are_beside_it() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))

    def tokens(rows: list[int], seed: int = 0) -> list[int]:
        drawn = Sampling(1.0, 0.9, seed, 3).of(rows)
        drawn(torch.zeros(len(rows), 1).long(), logits[rows])
        found: list[int] = drawn(torch.zeros(len(rows), 1).long(), logits[rows]).argmax(-1).tolist()
        return found

    whole = tokens(list(range(8)))
    assert [tokens([row])[0] for row in range(8)] == whole
    assert tokens([5, 2]) == [whole[5], whole[2]]
    assert tokens(list(range(8)), seed=1) != whole
