"""Budgets: whatever is used up first ends the search, its running trials judged, and a resume knows what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.search.preflight import look
from bilora_ray.search.simulated import Metrics, Moment, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.budget import Budget
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.search.study.study import SearchStudy

TRIAL = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "rho={low: 0.1, high: 0.9}")
HOUR_S = 3600.0


def curve(config: TrialConfig) -> list[Metrics]:
    """Four evaluations, each an hour after the other; the larger the radius, the worse."""
    return [
        {"step": s, "max_steps": 4, "eval_loss": config.rho + 1 / s, "train_runtime": s * HOUR_S} for s in (1, 2, 3, 4)
    ]


def opened(path: Path, *study: str) -> SearchStudy:
    given = ("study.scheduler=none", "study.name=s", "study.num_trials=12", "study.seed=3", *study)
    return open_study(load_space(None, [*TRIAL, *given]), Layout(path), {})


def search(path: Path, *study: str, workers: int = 4) -> list[Moment]:
    found = opened(path, *study)
    try:
        return simulate(found, curve, workers, keep=True)
    finally:
        found.release()


def statuses(path: Path) -> list[str]:
    return [record.status.value for record in load_study(Layout(path), "s").records()]


def test_the_time_of_the_search_ends_its_running_trials_at_their_next_evaluation(tmp_path: Path) -> None:
    moments = search(tmp_path, "study.max_hours=5.5")
    assert moments[-1].clock == 6 * HOUR_S
    records = load_study(Layout(tmp_path), "s").records()
    assert [record.history[-1]["step"] for record in records] == [4, 4, 4, 4, 2, 2, 2, 2]
    # Judged: what each has reached counts.
    assert {record.status for record in records} == {Status.COMPLETE}
    assert [record.ended_by for record in records] == [None] * 4 + ["max_hours"] * 4
    assert [record.value for record in records[4:]] == [record.history[1]["eval_loss"] for record in records[4:]]


@pytest.mark.parametrize(
    ("budget", "workers", "hours"),
    [
        (("study.max_device_hours=9",), 1, 9),
        (("study.max_device_hours=9", "resources.workers=2"), 1, 5),
        (("study.max_device_hours=9", "resources.gpus_per_worker=0.5"), 1, 18),
        (("study.max_cost=30", "study.price_per_gpu_hour=5"), 1, 6),
        (("study.max_device_hours=9",), 4, 12),
    ],
)
def test_devices_are_paid_by_the_time_that_trials_train(
    budget: tuple[str, ...], workers: int, hours: int, tmp_path: Path
) -> None:
    moments = search(tmp_path, *budget, workers=workers)
    assert sum(moment.seconds for moment in moments) == hours * HOUR_S
    found = load_study(Layout(tmp_path), "s")
    ended = found.end()
    assert ended is not None
    assert f"study.{ended.by}" in budget[0]
    assert found.finished()


def test_a_value_that_is_good_enough_ends_the_search(tmp_path: Path) -> None:
    moments = search(tmp_path, "study.target=0.9", workers=2)
    values = [moment.metrics["eval_loss"] for moment in moments]
    first = next(index for index, value in enumerate(values) if value <= 0.9)
    assert len(values) < 12 * 4
    # Who runs beside it ends at its next evaluation.
    assert len(values) - first <= 2
    assert str(load_study(Layout(tmp_path), "s").end()).count("eval_loss")


@pytest.mark.parametrize("budget", ["study.max_hours=5.5", "study.max_device_hours=9", "study.target=0.9"])
def test_a_resume_of_what_is_used_up_does_nothing_and_with_a_larger_budget_goes_on(budget: str, tmp_path: Path) -> None:
    search(tmp_path, budget)
    before = statuses(tmp_path)
    assert search(tmp_path, budget) == []
    key, value = budget.split("=")
    more = search(tmp_path, f"{key}={float(value) * (0.1 if 'target' in key else 1.5)}")
    assert {moment.number for moment in more}.isdisjoint(range(len(before)))
    assert statuses(tmp_path)[: len(before)] == before


@pytest.mark.parametrize("limit", [(), ("study.max_adapter_mb=1",)])
def test_the_target_is_of_the_first_objective_and_of_trials_that_keep_to_the_limits(
    limit: tuple[str, ...], tmp_path: Path
) -> None:
    both = "study.objectives=[{metric: eval_loss}, {metric: train_runtime}]"

    def large(config: TrialConfig) -> list[Metrics]:
        return [{**metrics, "adapter_mb": 2.0} for metrics in curve(config)]

    study = opened(tmp_path, "study.target=1.2", both, *limit)
    moments = simulate(study, large, 1)
    study.release()
    again = opened(tmp_path, "study.target=1.2", both, *limit)
    assert simulate(again, large, 1) == []
    again.release()
    reached = [moment for moment in moments if moment.metrics["eval_loss"] <= 1.2]
    assert len(moments) == 12 if limit else moments[-1] is reached[0]
    assert (load_study(Layout(tmp_path), "s").end() is None) is bool(limit)


def test_a_budget_that_is_gone_holds_nobody(tmp_path: Path) -> None:
    search(tmp_path, "study.max_hours=5.5")
    search(tmp_path)
    assert statuses(tmp_path) == ["complete"] * 12
    assert load_study(Layout(tmp_path), "s").end() is None


def test_who_was_killed_pays_the_same_in_all(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", "study.max_device_hours=9", workers=1)
    told = 0
    for _ in range(20):  # killed at its second evaluation, again and again
        study = opened(tmp_path / "killed", "study.max_device_hours=9")
        done = 0
        numbers = study.next_trials()
        if not numbers:
            study.release()
            break
        for metrics in curve(study.config(numbers[0])):
            known = study.study.trials[numbers[0]].intermediate_values
            if metrics["step"] < max(known, default=0):
                continue  # its checkpoint is behind it
            told += metrics["step"] not in known
            done += 1
            if study.report(numbers[0], metrics) is not Status.RUNNING or done == 2:
                break
        study.release()
    assert told == len(whole) == 9
    assert load_study(Layout(tmp_path / "killed"), "s").finished()
    killed = [trial.state for trial in load_study(Layout(tmp_path / "killed"), "s").study.trials]
    assert killed == [trial.state for trial in load_study(Layout(tmp_path / "whole"), "s").study.trials]


def test_the_end_is_known_where_the_search_died_before_its_trials_ended(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.target=1.2")
    (number,) = study.next_trials()
    metrics = {"step": 2, "max_steps": 4, "eval_loss": 1.1, "train_runtime": 1.0}
    study.budget.charge(study._live[number], metrics)
    assert study.budget.end() is not None  # and here it dies
    study.release()
    again = opened(tmp_path, "study.target=1.2")
    assert not again.finished()
    assert again.next_trials() == [number]
    assert again.report(number, metrics) is Status.COMPLETE
    assert again.next_trials() == []
    assert again.finished()


def test_the_study_runs_for_as_long_as_any_process_does(tmp_path: Path) -> None:
    study = opened(tmp_path)
    budgets = [study.budget, opened(tmp_path).budget]
    told = []
    for number, now in ((0, 100.0), (0, 120.0), (1, 130.0), (0, 150.0), (1, 160.0), (1, 140.0)):
        budgets[number].clock = lambda now=now: now
        told.append(budgets[number]._tick(study.study.user_attrs))
    # The ten seconds before the other began count once; a clock that goes back takes nothing away.
    assert told == [0.0, 20.0, 20.0, 50.0, 60.0, 60.0]


def test_several_processes_are_charged_together(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.max_device_hours=4")
    other = Budget(study.study, study.space, study.objective, study.folder, alone=False)
    assert other.device_hours() == 0
    (number,) = study.next_trials()
    study.report(number, curve(study.config(number))[2])
    assert study.budget.device_hours() == other.device_hours() == 3


def planted(config: TrialConfig) -> list[Metrics]:
    return [{"step": 1, "max_steps": 1, "eval_loss": (config.rho - 0.5) ** 2, "train_runtime": 1.0}]


def test_a_search_ends_when_no_settings_promise_a_gain_worth_having(tmp_path: Path) -> None:
    def steep(config: TrialConfig) -> list[Metrics]:
        (told,) = planted(config)
        return [{**told, "eval_loss": 1e4 * told["eval_loss"]}]

    ended = {}
    for name, curve, gain in (("flat", planted, "0.5"), ("flat", planted, "0.0000001"), ("steep", steep, "0.5")):
        study = opened(tmp_path / name / gain, f"study.min_gain={gain}", "study.num_trials=26")
        moments = simulate(study, curve, 1)
        ended[name, gain] = len(moments)
        study.release()
        again = opened(tmp_path / name / gain, f"study.min_gain={gain}", "study.num_trials=26")
        assert simulate(again, curve, 1) == []
        again.release()
    # What is promised is in the metric's own units: of the same trials and the same gain a steeper metric goes on.
    assert ended["flat", "0.5"] == 20 < ended["steep", "0.5"]
    assert ended["flat", "0.0000001"] == 26


def test_a_gain_that_the_bound_cannot_see_is_refused() -> None:
    method = "method={choice: [lora, bilora]}"
    with pytest.raises(UserError, match=r"study\.min_gain: .* trial\.rho some have not; write target"):
        look(load_space(None, [*TRIAL, method, "study.name=s", "study.min_gain=0.1"]))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("study.max_cost=3", "max_cost needs price_per_gpu_hour"),
        ("study.max_hours=0", "max_hours"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(given: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        opened(tmp_path, given)
