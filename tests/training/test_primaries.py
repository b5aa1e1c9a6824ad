"""Trials of each primary: what leaves training is what was evaluated, and nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_trials import Tiny, evaluate_adapter, reproducible, run_fit

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError
from bilora_ray.facts import STARTING
from bilora_ray.measures import Task
from bilora_ray.method import export_primary
from bilora_ray.method.primaries import starts
from bilora_ray.recipe import evaluation_config
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.training.compute import bases
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run, fit
from bilora_ray.training.model import AUTO_CLASS
from bilora_ray.training.tasks import TASKS as BY_TASK
from tests.training.test_checkpoint import assert_same_end, demanding, interrupted
from tests.training.test_export import batch_of, train
from tests.training.test_workers import check_alike, fit_together, settings_of, together, without_dropout

PRIMARIES = ("dora", "rslora", "pissa", "lora-ga")
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


@pytest.mark.parametrize(
    ("primary", "sharded"),
    [("dora", True), *(pytest.param(one, False, marks=pytest.mark.slow) for one in ("lora-ga", "dora"))],
)
def test_two_workers_train_it_as_one_does(primary: str, sharded: bool, tiny: Tiny, tmp_path: Path) -> None:
    length: dict[str, Any] = {"primary": primary, "rho": 0.2, "max_steps": 4, "eval_steps": 2, "learning_rate": 2e-3}
    length |= {"model_name_or_path": without_dropout(tiny, "causal-lm", tmp_path)}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **length), tmp_path / "one")
    settings = settings_of(tiny, "causal-lm", rows=3, **length)
    two = together(2, fit_together, settings, str(tmp_path / "two"), 2, sharded)
    assert reproducible(two[0]) == reproducible(two[1])
    check_alike(one, two[0], tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("primary", STARTING)
def test_it_begins_as_the_base_and_learns_by_other_factors_than_0(primary: str, tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm", primary=primary, precision="fp32"), TrialFolder(tmp_path))
    batch = batch_of(run.config)
    expected = base_of(run.config).eval()(**batch).logits
    for mode in (run.model.eval(), run.model.train()):
        assert torch.equal(mode(**batch).logits, expected)
    assert all(tensor.norm() > 0.01 for tensor in starts(run.model).values())
    folder = tmp_path / "exported"
    export_primary(run.model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (16, 32.0, True)
    written = load_file(folder / "adapter_model.safetensors").values()
    assert run.adapter_mb * 1e6 == pytest.approx(sum(4 * tensor.numel() for tensor in written))


def test_lora_ga_begins_along_the_gradient_of_its_first_rows(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", primary="lora-ga", method="lora", seed=3)
    one, same = (starts(Run(config, TrialFolder(tmp_path / name)).model) for name in "ab")
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    other = starts(Run(config.model_copy(update={"seed": 4}), TrialFolder(tmp_path / "c")).model)
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("primary", STARTING)
def test_a_base_that_is_kept_is_as_it_was(primary: str, tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny.config("causal-lm", max_steps=2, eval_steps=2)
    bases._kept.clear()
    alone = reproducible(reports_of(plain, tmp_path / "alone"))
    reports_of(plain.model_copy(update={"primary": primary}), tmp_path / "before")
    assert len(bases._kept) == 1
    kept, whole = bases._kept[0].model.state_dict(), base_of(plain).state_dict()
    assert kept.keys() == whole.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in whole.items())
    assert reproducible(reports_of(plain, tmp_path / "after")) == alone
    bases._kept.clear()


def reports_of(config: TrialConfig, path: Path) -> list[dict[str, float]]:
    """What a trial reports that finds its base kept, and keeps it."""
    reports: list[dict[str, float]] = []
    fit(config, TrialFolder(path), lambda metrics: reports.append(metrics) is None, keep_base=True)
    return reports


def test_a_trial_whose_checkpoint_goes_away_does_not_train_without_a_start(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", primary="pissa", max_steps=4, eval_steps=2)
    interrupted(config, tmp_path, 1)
    run = Run(config, TrialFolder(tmp_path))
    TrialFolder(tmp_path).discard_tensors()
    with pytest.raises(MachineError, match="gone"):
        run.resume()
