"""A search over trials that are known: the study decides as in a real one, on the clock that the trials tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilora_ray.config import TrialConfig
from bilora_ray.records import Status
from bilora_ray.search.simulated import Metrics, Moment, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study

TRIAL = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "rho={low: 0.1, high: 0.9}")


def curve(config: TrialConfig) -> list[Metrics]:
    """Nine evaluations, each a second after the other; the larger the radius, the worse."""
    steps = range(1, 10)
    return [{"step": s, "max_steps": 9, "eval_loss": config.rho + 1 / s, "train_runtime": float(s)} for s in steps]


def search(path: Path, scheduler: str, workers: int, keep: bool = False) -> list[Moment]:
    study = (f"study.scheduler={scheduler}", "study.name=s", "study.num_trials=12", "study.seed=3")
    opened = open_study(load_space(None, [*TRIAL, *study]), Layout(path), {})
    try:
        return simulate(opened, curve, workers, keep)
    finally:
        opened.release()


def test_each_trial_is_told_once_and_in_the_order_of_the_clock(tmp_path: Path) -> None:
    moments = search(tmp_path, "none", workers=4, keep=True)
    assert [moment.clock for moment in moments] == sorted(moment.clock for moment in moments)
    told = [(moment.number, moment.metrics["step"]) for moment in moments]
    assert sorted(told) == [(number, step) for number in range(12) for step in range(1, 10)]
    # Twelve trials of nine seconds, four at a time.
    assert moments[-1].clock == pytest.approx(27.0)
    records = load_study(Layout(tmp_path), "s").records()
    assert {record.status for record in records} == {Status.COMPLETE}
    assert [len(record.history) for record in records] == [9] * 12


def test_early_stops_save_what_they_save_in_a_real_search(tmp_path: Path) -> None:
    moments = search(tmp_path, "asha", workers=4)
    stopped = [moment for moment in moments if moment.status is Status.PRUNED]
    assert stopped
    assert sum(moment.seconds for moment in moments) < 12 * 9
    assert {moment.status for moment in moments if moment.metrics["step"] == 9} == {Status.COMPLETE}


def test_the_same_seed_tells_the_same(tmp_path: Path) -> None:
    assert search(tmp_path / "a", "asha", workers=4) == search(tmp_path / "b", "asha", workers=4)
