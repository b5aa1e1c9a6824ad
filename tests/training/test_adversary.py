"""What a trial tells of its perturbation, and that it trains as it would without telling it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import TASKS, Tiny, reproducible, run_fit

from bilora_ray.errors import NonFiniteLoss, OutOfMemory
from bilora_ray.facts import METHOD_NAMES, MethodName
from bilora_ray.measures import ADVERSITY, Task
from bilora_ray.method.spaces import FullSpace
from bilora_ray.settings import FACTS
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.probe import adversary
from bilora_ray.training.probe import sharpness as probe
from bilora_ray.training.probe.sharpness import Rows

SETTINGS: dict[str, Any] = {"adversary_steps": 3, "max_steps": 8, "eval_steps": 2, "rho": 0.2}
PERTURBED: tuple[MethodName, ...] = ("bilora", "dual-lora", "lora-sam", "looksam", "esam")


def told(report: dict[str, float]) -> set[str]:
    return (set(ADVERSITY) - {"auxiliary_norm"}) & report.keys()


def without(reports: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {key: value for key, value in one.items() if key not in ADVERSITY or key == "auxiliary_norm"}
        for one in reproducible(reports)
    ]


@pytest.mark.parametrize("method", ["bilora", "lora-sam", "esam"])
def test_to_tell_it_changes_nothing_of_a_training(method: str, tiny: Tiny, tmp_path: Path) -> None:
    reports = []
    for steps in (0, 1):
        settings = {**SETTINGS, "adversary_steps": steps, "method": method, "lora_dropout": 0.1}
        run = Run(tiny.config("causal-lm", **settings), TrialFolder(tmp_path / str(steps)))
        found = []
        while not run.is_over:
            run.train_step()
            if run.evaluation_due():
                found.append(run.evaluate())
        state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        reports.append((without(found), state, torch.get_rng_state(), found))
    (plain, weights, random, _), (same, others, moved, looked) = reports
    if method != "bilora":  # which tells the norm anyway
        same = [{key: value for key, value in one.items() if key != "auxiliary_norm"} for one in same]
    assert plain == same
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert torch.equal(random, moved)
    assert all(told(report) for report in looked)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_tells_it_after_so_many_steps(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    reports, _ = run_fit(tiny.config(task, **SETTINGS), tmp_path)
    # Three steps are over at the evaluations after 4, 6 and, of another three, not yet after 8.
    assert [bool(told(report)) for report in reports] == [False, True, True, False]
    looked = reports[1]
    assert told(looked) == set(ADVERSITY) - {"auxiliary_norm"}
    assert all(math.isfinite(looked[name]) for name in ADVERSITY)
    assert -1 <= looked["auxiliary_cosine"] <= 1
    assert 0 <= looked["subspace_overlap"] <= 1


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_only_methods_that_perturb_by_a_gradient_tell_it(method: MethodName, tiny: Tiny, tmp_path: Path) -> None:
    reports, _ = run_fit(tiny.config("causal-lm", **{**SETTINGS, "method": method, "max_steps": 4}), tmp_path)
    assert bool(told(reports[-1])) is (method in PERTURBED)
    if method in ("lora-sam", "looksam"):  # their perturbation is of the very batch
        assert reports[-1]["captured_sharpness"] > 0.1
        assert reports[-1]["auxiliary_norm"] > 0


@pytest.mark.parametrize(("steps", "every", "due"), [(3, 2, [4, 6]), (None, 2, []), (0, 1, []), (1, 3, [3, 6, 8])])
def test_it_is_told_by_the_first_evaluation_after_so_many_steps(
    steps: int | None, every: int, due: list[int], tiny: Tiny
) -> None:
    config = tiny.config("causal-lm", adversary_steps=steps)
    evaluations = [step for step in range(1, 9) if step % every == 0 or step == 8]
    looked = [
        now
        for before, now in zip([0, *evaluations], evaluations, strict=False)
        if adversary.is_due(config, now, before)
    ]
    assert looked == due


def test_by_default_it_is_each_1000_steps_of_what_is_not_large(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config("causal-lm")
    assert adversary.is_due(config, 1000, 950)
    assert not adversary.is_due(config, 999, 950)
    monkeypatch.setattr(adversary, "EVERY", 2)
    assert told(run_fit(config, tmp_path / "small")[0][-1])
    monkeypatch.setattr(adversary, "MOST_WEIGHTS", 1000)
    assert not told(run_fit(config, tmp_path / "large")[0][-1])
    asked = tiny.config("causal-lm", adversary_steps=2)
    assert told(run_fit(asked, tmp_path / "asked")[0][-1])
    assert not FACTS["adversary_steps"].searched


def test_it_resumes_to_the_bit(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", **SETTINGS, lora_dropout=0.1)
    whole, _ = run_fit(config, tmp_path / "whole")
    run = Run(config, TrialFolder(tmp_path / "cut"))
    for _ in range(4):
        run.train_step()
        if run.evaluation_due():
            run.evaluate()
    reports, progress = run_fit(config, tmp_path / "cut")
    assert progress.resumed_at == [4]
    assert reproducible(reports) == reproducible(whole)
    assert told(whole[2])


def test_passes_without_room_become_smaller_and_at_the_end_nothing_is_told(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config("causal-lm", **SETTINGS)
    run = Run(config, TrialFolder(tmp_path))
    for _ in range(4):
        run.train_step()
    rows = Rows(run.model, run.data.validation, config, run.data.tokenizer)
    batches = run._rows_of(3), run._rows_of(4)
    wanted = adversary.look(rows, run.optimizer, *batches, 8)
    largest, sizes = 3, list[int]()
    collate = probe.batch_of

    def full(task: Any, model: Any, part: Any, processor: Any) -> Any:
        sizes.append(len(part))
        if len(part) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collate(task, model, part, processor)

    monkeypatch.setattr(probe, "batch_of", full)
    rows = Rows(run.model, run.data.validation, config, run.data.tokenizer)
    assert adversary.look(rows, run.optimizer, *batches, 8) == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    assert max(sizes) == 8
    largest = 0
    assert adversary.look(rows, run.optimizer, *batches, 8) == {}
    with pytest.raises(OutOfMemory):
        rows.measured_of([rows.examples], lambda cuts: FullSpace(run.model).gradient(cuts[0]))


def test_the_held_out_batch_is_spread_over_the_validation_rows() -> None:
    rows: list[Any] = list(range(10))
    assert adversary.spread(rows, 4) == [0, 2, 5, 7]
    assert adversary.spread(rows, 20) == rows
    assert adversary.spread([], 4) == []


@pytest.mark.parametrize("settings", [{"clip": "per-layer"}, {"clip": "none"}, {"norm": "unscaled"}])
def test_where_rho_is_of_something_else_the_radius_is_what_the_perturbation_has(
    settings: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    run = Run(tiny.config("causal-lm", **SETTINGS, **settings), TrialFolder(tmp_path))
    run.train_step()
    space = FullSpace(run.model)
    perturb = adversary._perturb(run.config, run.optimizer, space)
    assert perturb is not None
    assert perturb(space.zeros()).radius is None


@pytest.mark.parametrize("norm", ["effective", "unscaled"])
def test_the_norm_is_of_what_is_added_to_the_weights_in_every_evaluation(norm: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = {**SETTINGS, "adversary_steps": 2, "eval_steps": 1, "max_steps": 4, "learning_rate": 0.03}
    reports, _ = run_fit(tiny.config("causal-lm", **settings, norm=norm), tmp_path)
    assert [bool(told(report)) for report in reports] == [False, True, False, True]
    radius = 0.2 if norm == "effective" else 0.4  # lora_alpha is twice the rank
    assert [report["auxiliary_norm"] for report in reports[1:]] == pytest.approx([radius] * 3, rel=1e-4)


def test_weights_that_are_no_numbers_are_told_as_a_loss_that_is_none(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm", **{**SETTINGS, "adversary_steps": 1}), TrialFolder(tmp_path))
    for _ in range(2):
        run.train_step()
    run.optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
    with pytest.raises(NonFiniteLoss):
        run.evaluate()
