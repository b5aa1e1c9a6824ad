"""Published data sets with a real tokenizer, from the file to a batch."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bilora_ray.config import TrialConfig
from bilora_ray.training.data import Truncation, collate, eval_batches, prepare, target_count
from bilora_ray.training.rows import TextRow, load_rows


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Any:
    return AutoTokenizer.from_pretrained(minilm, eos_token="[SEP]")


def test_gsm8k(tokenizer: Any, shared_data: Path) -> None:
    config = TrialConfig(
        model_name_or_path="m",
        task="causal-lm",
        train_data=str(shared_data / "gsm8k" / "train.jsonl"),
        validation_data=str(shared_data / "gsm8k" / "test.jsonl"),
        prompt_template="Question: {question}\nAnswer:",
        completion_template=" {answer}",
        max_train_samples=300,
        max_length=128,
        predict_with_generate=True,
        answer_pattern=r"#### (.+)",
    )
    rows = load_rows(config)
    assert (len(rows.train), len(rows.validation)) == (300, 1319)
    data = prepare(rows, config, tokenizer)
    lengths = [len(example.input_ids) for example in data.validation]
    cut = data.truncation["validation"].cut
    assert 0 < cut == sum(whole > 128 for whole in _whole_lengths(rows.validation, tokenizer))
    assert max(lengths) == 128
    batches = eval_batches(lengths, 32)
    targets = 0
    for batch in batches:
        tensors = collate([data.validation[row] for row in batch], config.task, tokenizer.pad_token_id)
        targets += target_count(tensors, config.task)
        assert int(tensors["attention_mask"].sum()) == sum(lengths[row] for row in batch)
    assert targets == sum(label != -100 for example in data.validation for label in example.labels)
    assert all(re.search(r"#### ", example.reference) for example in data.validation)


def _whole_lengths(rows: Any, tokenizer: Any) -> list[int]:
    assert all(isinstance(row, TextRow) for row in rows)
    return [len(tokenizer(row.prompt, row.completion, verbose=False)["input_ids"]) - 1 for row in rows]


def test_sst2(tokenizer: Any, shared_data: Path) -> None:
    config = TrialConfig(
        model_name_or_path="m",
        task="sequence-classification",
        train_data=str(shared_data / "sst2" / "train.tsv"),
        validation_data=str(shared_data / "sst2" / "dev.tsv"),
        column_names=("text", "label"),
    )
    rows = load_rows(config)
    assert rows.label_names == ("0", "1")
    data = prepare(rows, config, tokenizer)
    assert data.truncation == {"train": Truncation(6920, 0, 0), "validation": Truncation(872, 0, 0)}
    assert tokenizer.decode(data.validation[0].input_ids.tolist()) == "[CLS] one long string of cliches [SEP]"
    assert data.validation[0].labels.tolist() == [0]
