"""What is written is compared with what the tokenizer makes of a reference, and written as the settings say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import Tiny, write_rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

from bilora_ray.builtin import path as builtin_path
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.evaluate import load_adapted, predict
from bilora_ray.training.loading import Prepared, prepare
from bilora_ray.training.rehearsal import rehearse
from bilora_ray.training.rows import load_rows, notes
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset
from bilora_ray.training.tasks.text import TextRow

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *"abcd", "answer:", "good", "bad")


class Parrot:
    """A model that writes after each prompt what it was told to, and then the end."""

    config = GPT2Config()
    device, dtype = torch.device("cpu"), torch.float32
    generation_config = GenerationConfig()

    def __init__(self, said: Mapping[str, str], tokenizer: Any) -> None:
        self.said = {ids(prompt, tokenizer): ids(text, tokenizer) for prompt, text in said.items()}
        self.tokenizer = tokenizer

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        """Prompts with what is said to them, filled up with padding."""
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [[*self.said[prompt], self.tokenizer.eos_token_id] for prompt in prompts]
        width = max(map(len, answers))
        filled = [answer + [self.tokenizer.pad_token_id] * (width - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(filled)], dim=1)


def ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def words(*special: str, lower: bool = False) -> PreTrainedTokenizerFast:
    """A word is a token; `special` ones were added."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    if lower:
        backend.normalizer = normalizers.Lowercase()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


def config(**settings: Any) -> TrialConfig:
    defaults = {"model_name_or_path": "m", "train_data": "d", "task": "causal-lm", "predict_with_generate": True}
    return TrialConfig(**defaults | settings)


def prepared(rows: Mapping[str, str], tokenizer: Any, **settings: Any) -> Prepared:
    """The examples of completions by prompt."""
    texts = [TextRow(prompt, completion, "d.jsonl, line 7") for prompt, completion in rows.items()]
    return prepare(Dataset(texts, texts, None, {}), config(**settings), tokenizer)


def judged(said: Mapping[str, str], rows: Mapping[str, str], tokenizer: Any, **settings: Any) -> dict[str, float]:
    """The metrics of what is `said` to each prompt of `rows`."""
    examples = prepared(rows, tokenizer, **settings).validation
    return TASKS["causal-lm"].generated(Parrot(said, tokenizer), examples, config(**settings), tokenizer, ALONE, None)


def test_added_special_tokens_are_a_part_of_the_answer() -> None:
    tokenizer = words("<yes>", "<no>", "<other>")
    rows = {"a": "<yes>", "b": "<no>", "c": "b <yes> c"}
    assert judged(rows, rows, tokenizer) == {"eval_exact_match": 1}
    # All three were "" and "b c" without their special tokens.
    assert judged({"a": "<no>", "b": "<yes>", "c": "b <no> c"}, rows, tokenizer) == {"eval_exact_match": 0}
    assert judged({**rows, "c": "b c"}, rows, tokenizer) == {"eval_exact_match": pytest.approx(2 / 3)}
    # Those that no reference holds are not of the text.
    assert judged({**rows, "a": "<other> <yes>"}, rows, tokenizer) == {"eval_exact_match": 1}
    labels = {"label_names": ("<yes>", "<no>")}
    assert judged({"a": "<yes>", "b": "<no>"}, {"a": "<yes>", "b": "<no>"}, tokenizer, **labels)["eval_accuracy"] == 1


def test_special_tokens_that_no_reference_holds_are_left_out_as_ever() -> None:
    rows = {"a": "b", "c": "b d"}
    assert judged({"a": "<yes> b", "c": "b <yes> d"}, rows, words("<yes>")) == {"eval_exact_match": 1}


def test_what_the_tokenizer_makes_of_a_reference_can_be_written() -> None:
    rows = {"a": "A b", "b": "C  d", "c": "B"}
    lowered = {prompt: text.lower() for prompt, text in rows.items()}
    assert judged(lowered, rows, words(lower=True)) == {"eval_exact_match": 1}
    assert judged({**lowered, "c": "d"}, rows, words(lower=True)) == {"eval_exact_match": pytest.approx(2 / 3)}


def test_labels_are_compared_as_the_tokenizer_has_them() -> None:
    rows = {"a": "Good", "b": "Bad", "c": "Bad"}
    found = judged({"a": "good", "b": "bad", "c": "good"}, rows, words(lower=True), label_names=("Good", "Bad"))
    assert found["eval_exact_match"] == found["eval_accuracy"] == pytest.approx(2 / 3)


def test_a_pattern_finds_its_answer_in_both() -> None:
    rows = {"a": "A answer: B", "c": "answer: D"}
    settings = {"answer_pattern": "(?i)Answer: (.+)"}
    found = judged({"a": "c answer: b", "c": "answer: c"}, rows, words(lower=True), **settings)
    assert found == {"eval_exact_match": 0.5}


def test_a_pattern_that_finds_nothing_in_what_the_tokenizer_leaves_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        prepared({"a": "Answer: B"}, words(lower=True), answer_pattern="Answer: (.+)")
    assert str(caught.value) == (
        "d.jsonl, line 7: answer_pattern matches nothing in the completion as the tokenizer has it ('answer: b')"
    )


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_references_that_what_is_written_has_no_room_for_are_counted(task: Task) -> None:
    rows = {"a": "a b c d", "b": "a b c", "c": "a b answer: c d"}
    data = prepared(rows, words(), task=task, max_new_tokens=3)
    assert data.truncation["validation"].answer_cut == 2
    assert data.truncation["validation"].cut == data.truncation["train"].answer_cut == 0
    assert list(data.truncation["validation"].notes(config(max_new_tokens=3).model_dump())) == [
        "max_new_tokens: of 2 validation rows a text of 3 tokens ends before the answer of its reference, so that none "
        "can be right; raise it"
    ]
    # With a pattern the answer may come before the end.
    found = prepared({"c": "a b answer: c"}, words(), task=task, max_new_tokens=4, answer_pattern="answer: (.)")
    assert found.truncation["validation"].answer_cut == 0
    assert prepared(rows, words(), task=task, predict_with_generate=False).truncation["validation"].answer_cut == 0


def test_a_dry_run_tells_of_them(tiny: Tiny) -> None:
    (note,) = rehearse(tiny.config("causal-lm", predict_with_generate=True, max_new_tokens=2)).notes
    assert note.startswith("max_new_tokens: of ")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_quickstarts_references_are_what_its_tokenizer_makes_of_them(split: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin_path("quickstart/model"))
    lines = builtin_path(f"quickstart/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line).values() if isinstance(text, str)]
    written = tokenizer.batch_decode(tokenizer(texts, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    assert written == texts


# What would change what is written: each alone, and the names of all in a note.
PREFERENCES: dict[str, Any] = {
    "bad_words_ids": [[5]],
    "begin_suppress_tokens": list(range(5, 60)),
    "do_sample": True,
    "exponential_decay_length_penalty": [1, 9.0],
    "forced_eos_token_id": 5,
    "min_new_tokens": 12,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "repetition_penalty": 9.0,
    "suppress_tokens": list(range(5, 60)),
}


def preferring(tiny: Tiny, task: Task, folder: Path, **preferences: Any) -> TrialConfig:
    """A trial of a base whose file says more than its ends."""
    model = shutil.copytree(tiny.model(task), folder, dirs_exist_ok=True)
    found = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**found, **preferences}))
    data = str(write_rows(folder / "rows.jsonl", [{"prompt": "say red", "completion": "red"}] * 2))
    settings = {"train_data": data, "validation_data": data, "predict_with_generate": True, "max_new_tokens": 12}
    return tiny.config(task, model_name_or_path=str(model), **settings)


def written(config: TrialConfig) -> Sequence[str]:
    model, data, _ = load_adapted(None, config)
    return [row.prediction for row in predict(model, data, config, 1)]


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_the_base_does_not_say_how_texts_are_written(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    plain = written(preferring(tiny, task, tmp_path))
    for key, value in PREFERENCES.items():
        torch.manual_seed(1)
        assert written(preferring(tiny, task, tmp_path, **{key: value})) == plain, key


def test_the_base_is_left_with_what_it_says(tiny: Tiny, tmp_path: Path) -> None:
    config = preferring(tiny, "causal-lm", tmp_path, repetition_penalty=9.0)
    model, data, _ = load_adapted(None, config)
    before = model.generation_config
    predict(model, data, config, 1)
    assert model.generation_config is before
    assert before.repetition_penalty == 9.0


def test_what_the_base_would_have_changed_is_told(tiny: Tiny, tmp_path: Path) -> None:
    def told(**preferences: Any) -> list[str]:
        config = preferring(tiny, "causal-lm", tmp_path, **preferences)
        return [line for line in notes(load_rows(config), config, 1) if line.startswith("predict_with_generate")]

    assert told() == []
    assert told(min_length=0, num_beams=1, do_sample=False, temperature=0.6) == []
    assert told(do_sample=True, temperature=0.6, num_beams=4, suppress_tokens=[3, 4]) == [
        "predict_with_generate: texts are written greedily, without the base's own do_sample (true), num_beams (4), "
        "suppress_tokens"
    ]


def test_what_a_base_without_a_generation_config_would_have_changed_is_told(tiny: Tiny, tmp_path: Path) -> None:
    config, model = preferring(tiny, "causal-lm", tmp_path), tmp_path
    (model / "generation_config.json").unlink()
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "no_repeat_ngram_size": 3}))
    assert [line for line in notes(load_rows(config), config, 1) if line.startswith("predict_with_generate")] == [
        "predict_with_generate: texts are written greedily, without the base's own no_repeat_ngram_size (3)"
    ]
