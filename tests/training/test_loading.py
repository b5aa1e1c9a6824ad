"""Data that are loaded once for all trials of a process, and anew where they would be others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import Tiny, write_rows

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.settings import FACTS
from bilora_ray.training.loading import NOT_OF_EXAMPLES, Loaded, load_data

OTHERS: dict[str, Any] = {
    "class_weights": "balanced",
    "attn_implementation": "eager",
    "method": "lora",
    "primary": "rslora",
    "clip": "none",
    "norm": "unscaled",
    "ascent": "tangent",
    "rwp_space": "lora",
    "precision": "bf16",
    "quantization": "nf4",
    "lr_scheduler_type": "linear",
    "metric": "eval_perplexity",
    "target_modules": ("q_proj",),
    "gradient_checkpointing": True,
    "torch_compile": True,
    "per_device_generation_batch_size": 64,
    "tokens_per_pass": 64,
    "early_stopping_patience": 3,
    "adversary_steps": 3,
    "test_data": "org/test",
    "test_revision": "main",
    "test_split": "test",
    "retention_data": "texts.jsonl",
}
# What a setting is refused without.
NEEDED = {
    "early_stopping_threshold": {"early_stopping_patience": 3},
    "test_revision": {"test_data": "org/test"},
    "test_split": {"test_data": "org/test"},
}


def other(setting: str, value: Any) -> Any:
    """Another value of `setting`."""
    if setting in OTHERS:
        return OTHERS[setting]
    return 0.25 if value is None or isinstance(value, float) else value + 1


def test_what_was_known_not_to_decide_the_examples_still_does_not() -> None:
    before = """
        attn_implementation auxiliary_learning_rate auxiliary_rank eval_steps gradient_accumulation_steps
        gradient_checkpointing learning_rate lora_alpha lora_dropout lr_scheduler_type max_grad_norm max_steps method
        metric num_train_epochs per_device_eval_batch_size per_device_train_batch_size precision quantization rank rho
        target_modules warmup_ratio weight_decay
    """
    assert set(before.split()) <= NOT_OF_EXAMPLES
    assert not any(FACTS[key].decides in ("rows", "training rows") for key in NOT_OF_EXAMPLES)


@pytest.mark.parametrize("setting", sorted(NOT_OF_EXAMPLES))
def test_trials_that_differ_in_their_training_share_their_data(setting: str, tiny: Tiny) -> None:
    task: Task = "sequence-classification" if setting == "class_weights" else "causal-lm"
    config = tiny.config(task, max_steps=None)
    changed = {setting: 3 if setting == "max_steps" else other(setting, getattr(config, setting))}
    changed |= NEEDED.get(setting, {})
    assert load_data(config) is load_data(TrialConfig(**{**config.model_dump(), **changed}))


@pytest.mark.parametrize(
    "changed",
    [
        {"max_train_samples": 5},
        {"max_length": 16},
        {"prompt_template": "{prompt}?"},
        {"max_eval_samples": 3},
        {"max_new_tokens": 60, "predict_with_generate": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_data_settings_have_data_of_their_own(changed: dict[str, Any], tiny: Tiny) -> None:
    config = tiny.config("causal-lm")
    first, second = load_data(config), load_data(config.model_copy(update=changed))
    assert (first.train, first.validation) != (second.train, second.validation)
    assert (load_data(config).train, load_data(config).validation) == (first.train, first.validation)


def test_trials_that_differ_in_their_seed_share_their_data_if_the_split_has_its_own(tiny: Tiny) -> None:
    def loaded(**seeds: int) -> Loaded:
        return load_data(tiny.config("causal-lm", validation_data=None, **seeds))

    first = loaded(seed=0)
    assert loaded(seed=1, split_seed=0) is first
    assert loaded(seed=1).validation != first.validation


def test_a_file_that_was_written_again_is_read_again(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": f"{number}"} for number in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = tiny.config("causal-lm", train_data=str(path))
    assert len(load_data(config).train) == 4
    path.write_text(path.read_text() + json.dumps(rows[0]) + "\n")
    assert len(load_data(config).train) == 5
    path.unlink()
    with pytest.raises(UserError):
        load_data(config)


@pytest.mark.parametrize("name", ["shards", "shards/*.jsonl"])
def test_a_shard_that_was_written_again_or_added_is_read_again(name: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    row = {"prompt": "a", "completion": "b"}
    first = write_rows(tmp_path / "shards" / "1.jsonl", [row] * 2)
    config = tiny.config("causal-lm", train_data=f"{tmp_path}/{name}")
    assert len(load_data(config).train) == 2
    first.write_text(first.read_text() * 2)
    assert len(load_data(config).train) == 4
    write_rows(tmp_path / "shards" / "2.jsonl", [row])
    assert len(load_data(config).train) == 5
