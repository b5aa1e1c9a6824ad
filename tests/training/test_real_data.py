"""Published data sets: from the file to a batch with a real tokenizer, and through the whole loop."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import Tiny, evaluate_adapter, run_fit, write_rows
from transformers import AutoTokenizer

from bilora_ray.config import TrialConfig
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config
from bilora_ray.training.data.batches import eval_batches
from bilora_ray.training.data.truncation import Truncation
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import prepare
from bilora_ray.training.rows import about, load_rows
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.text import TextRow


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
        answer_pattern=r"#\s*#\s*#\s*#\s*(.+)",  # a BERT writes a space after each mark
    )
    rows = load_rows(config)
    assert (len(rows.train), len(rows.validation)) == (300, 1319)
    data = prepare(rows, config, tokenizer)
    lengths = [len(example.input_ids) for example in data.validation]
    cut = data.truncation["validation"].cut
    # A row is too long in itself, or its prompt beside the 64 tokens that are written after it.
    prompts = [len(tokenizer(row.prompt)["input_ids"]) - 1 for row in rows.validation if isinstance(row, TextRow)]
    wholes = _whole_lengths(rows.validation, tokenizer)
    assert 0 < cut == sum(whole > 128 or prompt > 64 for whole, prompt in zip(wholes, prompts, strict=True))
    assert max(lengths) == 128
    assert max(len(example.prompt_ids or ()) for example in data.validation) == 64
    batches = eval_batches(lengths, 32)
    targets = 0
    for batch in batches:
        examples = [data.validation[row] for row in batch]
        tensors = TASKS[config.task].collate(examples, tokenizer)
        targets += TASKS[config.task].target_count(examples)
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


def word_problems(shared_data: Path, folder: Path) -> dict[str, str]:
    """Files of GSM8K's questions, with which operations their answers need, and how many steps."""
    files = {}
    for split, source, count in (("train", "train", 400), ("validation", "test", 150)):
        lines = (shared_data / "gsm8k" / f"{source}.jsonl").read_text().splitlines()[:count]
        rows = []
        for problem in map(json.loads, lines):
            steps = re.findall(r"<<(.*?)=", problem["answer"])
            operations = [sign for sign in "+-*/" if any(sign in step for step in steps)]
            rows.append({"text": problem["question"], "operations": operations, "steps": len(steps)})
        files[f"{split}_data"] = str(write_rows(folder / f"{split}.jsonl", rows))
    return files


def test_word_problems_as_sets_and_as_numbers(shared_data: Path, tmp_path: Path) -> None:
    files = word_problems(shared_data, tmp_path)
    config = TrialConfig(
        model_name_or_path="m", task="multi-label-classification", label_column="operations", metric="eval_f1", **files
    )
    assert about(load_rows(config), config) == [
        "train labels: '*' 295, '+' 236, '-' 207, '/' 185, none 14",
        "validation labels: '*' 114, '+' 89, '-' 70, '/' 64, none 4",
        "without learning, where every row is '*', '+': eval_f1 0.6374",
    ]
    config = TrialConfig(model_name_or_path="m", task="regression", label_column="steps", **files)
    assert about(load_rows(config), config) == [
        "train labels: 0 to 8, mean 3.315, standard deviation 1.522",
        "validation labels: 0 to 7, mean 3.027, standard deviation 1.346",
        "without learning, where every row is 3.315: eval_loss 1.896",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings", "better"),
    [
        ("multi-label-classification", {"label_column": "operations", "metric": "eval_f1"}, 0.66),
        ("regression", {"label_column": "steps", "metric": "eval_pearson"}, 0.3),
    ],
)
def test_a_real_encoder_learns_word_problems(
    task: Task, settings: dict[str, Any], better: float, minilm: Path, shared_data: Path, tmp_path: Path
) -> None:
    config = TrialConfig(
        model_name_or_path=str(minilm),
        task=task,
        max_length=96,
        learning_rate=2e-3,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        eval_steps=0.5,
        **word_problems(shared_data, tmp_path),
        **settings,
    )
    reports, progress = run_fit(config, tmp_path / "trial")
    assert progress.best_value is not None
    assert progress.best_value >= better
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    best = next(report for report in reports if report["step"] == progress.best_step)
    assert evaluate_adapter(adapter, evaluation_config(adapter, {})) == {k: best[k] for k in config.available_metrics}


@pytest.mark.slow
def test_a_real_encoder_learns_sst2(minilm: Path, shared_data: Path, tmp_path: Path) -> None:
    config = TrialConfig(
        model_name_or_path=str(minilm),
        task="sequence-classification",
        train_data=str(shared_data / "sst2" / "train.tsv"),
        validation_data=str(shared_data / "sst2" / "dev.tsv"),
        column_names=("sentence", "label"),
        text_column="sentence",
        max_train_samples=600,
        max_eval_samples=200,
        max_length=48,
        metric="eval_accuracy",
        learning_rate=2e-3,
        num_train_epochs=1,
        eval_steps=0.5,
    )
    reports, progress = run_fit(config, tmp_path)
    assert progress.best_value is not None
    assert progress.best_value >= 0.75
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]
    assert reports[-1]["auxiliary_norm"] == pytest.approx(config.rho, rel=1e-4)
    adapter = TrialFolder(tmp_path).best_adapter()
    assert adapter is not None
    best = next(report for report in reports if report["step"] == progress.best_step)
    assert evaluate_adapter(adapter, evaluation_config(adapter, {})) == {k: best[k] for k in config.available_metrics}


def test_gsm8k_goes_through_the_whole_loop(tiny: Tiny, shared_data: Path, tmp_path: Path) -> None:
    config = tiny.config(
        "causal-lm",
        train_data=str(shared_data / "gsm8k" / "train.jsonl"),
        validation_data=str(shared_data / "gsm8k" / "test.jsonl"),
        prompt_template="{question}\n",
        completion_template="{answer}",
        max_train_samples=40,
        max_eval_samples=6,
        max_length=256,
        per_device_train_batch_size=4,
        max_steps=6,
        eval_steps=3,
        predict_with_generate=True,
        max_new_tokens=16,
        answer_pattern=r"####\s*(.+)",
    )
    reports, progress = run_fit(config, tmp_path)
    assert [report["step"] for report in reports] == [3, 6]
    assert all(report["eval_exact_match"] == 0.0 for report in reports)  # it has learned no arithmetic
    assert reports[-1]["eval_loss"] < reports[0]["eval_loss"]
    assert reports[-1]["rows_cut"] > 0
    best = reports[-1] if progress.best_step == 6 else reports[0]
    adapter = TrialFolder(tmp_path).best_adapter()
    assert evaluate_adapter(adapter, config) == {name: best[name] for name in config.available_metrics}
