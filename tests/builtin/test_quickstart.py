"""The quickstart that ships in the package: its data, and what its model can and cannot do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bilora_ray.builtin import NAMES, path
from bilora_ray.builtin.make_quickstart import CHAT_TEMPLATE, exact_match
from bilora_ray.builtin.quickstart_data import SPLIT_SIZES, plain_rows, pretraining_rows, write_splits
from bilora_ray.errors import UserError

MODEL_BYTES = 4_000_000
LONGEST_ROW_TOKENS = 64
LONGEST_COMPLETION_TOKENS = 16


def split_rows(name: str) -> list[Any]:
    """Return the rows of one split that ships."""
    return [json.loads(line) for line in path(f"quickstart/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread, and restore the number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer that ships."""
    return AutoTokenizer.from_pretrained(path("quickstart/model"), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Return the model that ships."""
    folder = path("quickstart/model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def test_data_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    for written in write_splits(tmp_path):
        assert written.read_bytes() == path(f"quickstart/{written.name}").read_bytes()


def test_splits_have_their_sizes_and_share_no_prompt_and_no_sum() -> None:
    splits = {name: split_rows(name) for name in SPLIT_SIZES}
    assert {name: len(rows) for name, rows in splits.items()} == SPLIT_SIZES
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    sums = [{row["completion"] for row in rows} for rows in splits.values()]
    assert len(set.union(*sums)) == sum(len(some) for some in sums)


def test_completions_are_right_and_end_with_the_answer() -> None:
    pattern = re.compile(r" (\d+) ([-+*]) (\d+) = (\d+) #### (\d+)")
    for row in split_rows("train") + split_rows("validation") + split_rows("test"):
        match = pattern.fullmatch(row["completion"])
        assert match
        a, op, b, result, answer = match.groups()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(result)
        assert result == answer
        assert re.search(rf"\b{a}\b", row["prompt"])
        assert re.search(rf"\b{b}\b", row["prompt"])


def test_measured_plain_rows_are_not_in_the_corpus() -> None:
    corpus = {row["prompt"] for row in pretraining_rows(20_000)}
    assert sum(row["prompt"] in corpus for row in plain_rows(100)) <= 1


def test_rows_are_short(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in split_rows("train") + split_rows("test"):
        prompt, completion = (len(tokenizer(row[part])["input_ids"]) for part in ("prompt", "completion"))
        assert completion + 1 <= LONGEST_COMPLETION_TOKENS
        assert prompt + completion + 1 <= LONGEST_ROW_TOKENS


def test_tokenizer_has_special_tokens_and_covers_unseen_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    text = "Zounds, 1234 übermarmosets!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_question_and_its_answer_are_chatted_as_the_model_has_seen_them(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE
    row = split_rows("train")[0]
    chat = split_rows("chats")[0]["messages"]
    assert [turn["content"] for turn in chat[:2]] == [row["prompt"], row["completion"].strip()]
    seen = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    assert tokenizer.apply_chat_template(chat[:2])["input_ids"] == seen
    told = [{"role": "system", "content": "Add."}, chat[0]]
    assert tokenizer.apply_chat_template(told, tokenize=False) == f"Add. {row['prompt']}"


def test_model_is_small() -> None:
    assert sum(file.stat().st_size for file in path("quickstart/model").iterdir()) <= MODEL_BYTES


def test_model_solves_its_own_wording(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert exact_match(model, tokenizer, plain_rows(100)) >= 0.85


def test_model_does_not_solve_the_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert exact_match(model, tokenizer, split_rows("test")[:100]) <= 0.35


def test_model_stops_after_its_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = tokenizer(plain_rows(1)[0]["prompt"], return_tensors="pt")
    output = model.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    assert output[0, -1].item() == tokenizer.eos_token_id


def test_paths_are_absolute_and_exist() -> None:
    assert all(path(name).is_absolute() and path(name).exists() for name in NAMES)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError) as error:
        path("quickstart/trian.jsonl")
    assert str(error.value) == "no built-in 'quickstart/trian.jsonl'; did you mean 'quickstart/train.jsonl'?"


def test_package_and_data_do_not_import_torch() -> None:
    code = "import sys, bilora_ray.builtin.quickstart_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
