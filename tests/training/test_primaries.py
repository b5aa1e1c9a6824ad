"""Trials of each primary: what leaves training is what was evaluated, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_trials import Tiny, evaluate_adapter, reproducible, run_fit

from bilora_ray.config import Task, TrialConfig
from bilora_ray.recipe import evaluation_config
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.training.model import AUTO_CLASS
from bilora_ray.training.tasks import TASKS as BY_TASK
from tests.training.test_checkpoint import assert_same_end, demanding, interrupted
from tests.training.test_export import train
from tests.training.test_workers import check_alike, fit_together, settings_of, together, without_dropout

PRIMARIES = ("dora", "rslora")
# Encoders, decoders, both, and GPT-2's own kind of layers.
TASKS: tuple[Task, ...] = ("causal-lm", "seq2seq-lm", "sequence-classification", "image-classification")


def base_of(config: TrialConfig) -> Any:
    """The base model as anybody loads it."""
    more = BY_TASK[config.task].model_arguments(("bad", "good") if config.task.endswith("classification") else None)
    return AUTO_CLASS[config.task].from_pretrained(config.model_name_or_path, **more)


@pytest.mark.parametrize("primary", PRIMARIES)
@pytest.mark.parametrize("task", TASKS)
def test_plain_peft_on_the_base_computes_what_was_evaluated(
    task: Task, primary: str, tiny: Tiny, tmp_path: Path
) -> None:
    trained = train(tiny.config(task, primary=primary, rho=0.5, max_steps=6), tmp_path / "trial")
    exported = tmp_path / "exported"
    assert export_adapter(trained.adapter, exported, {"study": "s", "trial": 0}, check=True) == []
    for adapter in (trained.adapter, exported):
        model = PeftModel.from_pretrained(base_of(trained.config), str(adapter)).eval()
        with torch.inference_mode():
            logits = model(**trained.batch).logits
        assert (logits - trained.logits).abs().max() <= 1e-5
    with model.disable_adapter(), torch.inference_mode():
        assert (model(**trained.batch).logits - trained.logits).abs().max() > 1e-3
    again = evaluate_adapter(trained.adapter, evaluation_config(trained.adapter, {}))
    assert again["eval_loss"] == pytest.approx(trained.metrics["eval_loss"], abs=1e-5)
    assert f"| primary | {primary} |" in (exported / "README.md").read_text()


@pytest.mark.parametrize("primary", PRIMARIES)
def test_it_is_merged_as_it_was_evaluated(primary: str, tiny: Tiny, tmp_path: Path) -> None:
    trained = train(tiny.config("causal-lm", primary=primary, max_steps=6), tmp_path / "trial")
    assert export_merged(trained.adapter, tmp_path / "merged", {}) == []
    merged = AUTO_CLASS["causal-lm"].from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        assert (merged(**trained.batch).logits - trained.logits).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["lora", "bilora"])
@pytest.mark.parametrize("primary", PRIMARIES)
def test_a_resumed_trial_ends_as_an_uninterrupted_one(primary: str, method: str, tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, "causal-lm", method, primary=primary, max_steps=7)
    _, expected = run_fit(config, tmp_path / "whole")
    for evaluation in (1, 2):
        path = tmp_path / f"after-{evaluation}"
        interrupted(config, path, evaluation)
        torch.rand(3)
        _, progress = run_fit(config, path)
        assert progress.resumed_at == [3 * evaluation]
        assert_same_end(path, progress, tmp_path / "whole", expected)


@pytest.mark.parametrize(("primary", "sharded"), [("dora", True), pytest.param("dora", False, marks=pytest.mark.slow)])
def test_two_workers_train_it_as_one_does(primary: str, sharded: bool, tiny: Tiny, tmp_path: Path) -> None:
    length: dict[str, Any] = {"primary": primary, "rho": 0.2, "max_steps": 4, "eval_steps": 2, "learning_rate": 2e-3}
    length |= {"model_name_or_path": without_dropout(tiny, "causal-lm", tmp_path)}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **length), tmp_path / "one")
    settings = settings_of(tiny, "causal-lm", rows=3, **length)
    two = together(2, fit_together, settings, str(tmp_path / "two"), 2, sharded)
    assert reproducible(two[0]) == reproducible(two[1])
    check_alike(one, two[0], tmp_path / "one", tmp_path / "two")
