"""Sharpness as an evaluation tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import TASKS, Tiny, evaluate_adapter, run_fit

from bilora_ray.config import TrialConfig
from bilora_ray.measures import Task
from bilora_ray.method.sharpness import adversarial_rises
from bilora_ray.method.spaces import FullSpace, LoraSpace
from bilora_ray.training.evaluate import load_adapted
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.probe import sharpness as probe

SETTINGS: dict[str, Any] = {"sharpness_radius": 0.1, "max_steps": 4, "eval_steps": 2}


def trained(tiny: Tiny, folder: Path, task: Task = "causal-lm", **settings: Any) -> tuple[TrialConfig, Path, Any]:
    config = tiny.config(task, **{**SETTINGS, **settings})
    reports, _ = run_fit(config, folder)
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    return config, adapter, reports


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_is_as_sharp_as_its_evaluation_said(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    config, adapter, reports = trained(tiny, tmp_path, task)
    best = min(reports, key=lambda report: report["eval_loss"])
    assert best["sharpness"] > 0
    assert evaluate_adapter(adapter, config) == {name: best[name] for name in config.available_metrics}
    # The base model alone has no adapter.
    assert "sharpness" not in evaluate_adapter(None, config)


def test_to_measure_it_changes_nothing_of_a_training(tiny: Tiny, tmp_path: Path) -> None:
    with_it = trained(tiny, tmp_path / "with", method="bilora", lora_dropout=0.1)
    without = trained(tiny, tmp_path / "without", method="bilora", lora_dropout=0.1, sharpness_radius=None)
    assert [report["eval_loss"] for report in with_it[2]] == [report["eval_loss"] for report in without[2]]
    assert [report["train_loss"] for report in with_it[2]] == [report["train_loss"] for report in without[2]]


def test_a_trial_may_be_judged_by_it(tiny: Tiny, tmp_path: Path) -> None:
    config, _, reports = trained(tiny, tmp_path, metric="sharpness")
    assert not config.objective.greater_is_better
    best = min(reports, key=lambda report: report["sharpness"])
    found = TrialFolder(tmp_path).best_adapter()
    assert found is not None
    assert found.name == f"step-{best['step']:08}"


def test_passes_without_room_become_smaller_and_the_measure_stays(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, adapter, reports = trained(tiny, tmp_path)
    model, data, _ = load_adapted(adapter, config)
    rows = probe.Rows(model, data.validation, config, data.tokenizer)
    sizes: list[int] = []
    collate = probe.batch_of

    def full(task: Any, model: Any, part: Any, processor: Any) -> Any:
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collate(task, model, part, processor)

    monkeypatch.setattr(probe, "batch_of", full)
    space = FullSpace(model)
    (found,) = rows.measured(lambda batches: adversarial_rises(space, batches[0], [0.1]))
    assert max(sizes) > 3
    assert found == pytest.approx(
        probe.sharpness(model, data.validation, config, data.tokenizer)["sharpness"], rel=1e-4
    )
    assert found == pytest.approx(min(reports, key=lambda report: report["eval_loss"])["sharpness"], rel=1e-4)


def test_a_survey_measures_both_spaces(tiny: Tiny, tmp_path: Path) -> None:
    config, adapter, _ = trained(tiny, tmp_path)
    model, data, _ = load_adapted(adapter, config)
    rows, told = probe.Rows(model, data.validation, config, data.tokenizer), list[str]()
    for kind in (FullSpace, LoraSpace):
        found = probe.survey(rows, [0.05, 0.1], kind, 4, told.append)
        assert len(found.adversarial) == len(found.m_sharpness) == len(found.random.mean) == 2
        # Each batch's own worst direction is worse for it than that of all.
        assert found.m_sharpness[1] > found.adversarial[1] > found.random.mean[1]
        assert all(
            low < mean < high
            for low, mean, high in zip(*[getattr(found.random, k) for k in ("low", "mean", "high")], strict=True)
        )
        assert found.top_eigenvalue.error <= 0.01 * found.top_eigenvalue.value
    assert len(told) == 8
    assert "the same of each 4 rows" in told


def test_a_band_is_students() -> None:
    found = probe.band([[1.0], [2.0], [3.0]])
    assert (found.mean, found.high) == ([2.0], [pytest.approx(2 + 4.302653 / 3**0.5)])
