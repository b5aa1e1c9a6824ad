"""Population based training: who ends, who goes on from whom and with what, and that no kill changes it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from rich.console import Console

from bilora_ray.cli.leaderboard import as_json, print_leaderboard
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.records import Parent, Status
from bilora_ray.search.simulated import Metrics, Moment, _write, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.budget import RUN
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.population.offspring import changed, offspring
from bilora_ray.search.study.steering.requests import enqueue
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import StudyView
from bilora_ray.settings import AMID
from bilora_ray.training.folder import CHANGED

TRIAL = (
    *("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data"),
    *("rho={low: 0.01, high: 1, log: true}", "learning_rate={low: 0.0001, high: 0.01, log: true}"),
    *("rank={choice: [4, 8]}", "weight_decay={choice: [0, 0.01, 0.1]}"),
)
STUDY = ("study.name=s", "study.scheduler=pbt", "study.sampler=random", "study.rung_unit=steps", "study.grace_period=2")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def space(*given: str) -> Space:
    return load_space(None, [*TRIAL, *STUDY, *given])


def opened(path: Path, *given: str, storage: BaseStorage | None = None) -> SearchStudy:
    """The study, in a memory of its own unless there is a storage."""
    study = optuna.create_study(study_name="s", storage=storage or InMemoryStorage(), load_if_exists=True)
    layout = Layout(path)
    layout.make("s")
    found = SearchStudy(study, space("study.num_trials=24", *given), layout)
    found.adopt()
    return found


def curve(config: TrialConfig) -> list[Metrics]:
    """Nine evaluations, a second after each other; best where rho is 0.1."""
    odd = math.sin(1000 * config.rho) / 4
    end = abs(math.log(config.rho / 0.1)) + odd
    return [{"step": s, "max_steps": 9, "eval_loss": end + 1 / s, "train_runtime": float(s)} for s in range(1, 10)]


def searched(path: Path, *given: str) -> tuple[SearchStudy, list[Moment]]:
    study = opened(path, *given)
    moments = simulate(study, curve, workers=4)
    study.release()
    return study, moments


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchStudy, list[Moment]]:
    return searched(tmp_path_factory.mktemp("search"), "study.max_device_hours=100")


def children(study: StudyView) -> dict[int, Parent]:
    return {record.number: record.parent for record in study.records() if record.parent is not None}


def test_the_places_of_the_worst_are_taken_by_trials_that_go_on_from_the_best(
    search: tuple[SearchStudy, list[Moment]],
) -> None:
    study, moments = search
    records, found = study.records(), children(study)
    assert [record.number for record in records] == list(range(24))
    assert {record.status for record in records} == {Status.COMPLETE, Status.PRUNED}
    assert len(found) >= 4
    # A place is left by one that was stopped, and taken once.
    replaced = [parent.replaces for parent in found.values()]
    assert len(set(replaced)) == len(replaced)
    assert {records[number].status for number in replaced} == {Status.PRUNED}
    for number, parent in found.items():
        told = [moment for moment in moments if moment.number == number]
        assert [moment.metrics["step"] for moment in told][:1] == [parent.step + 1]
        assert parent.step == 2 * parent.rung
        assert [metrics["step"] for metrics in records[number].history] == [moment.metrics["step"] for moment in told]
        # Its clock goes on where its parent's was; what it took by itself is what a search pays for.
        assert sum(moment.seconds for moment in told) == pytest.approx(len(told))
        assert told[-1].metrics["train_runtime"] == pytest.approx(parent.seconds + len(told))
        settings, inherited = records[number].settings, records[parent.number].settings
        assert {key for key in settings if settings[key] != inherited[key]} <= AMID
        left = {metrics["step"]: metrics["eval_loss"] for metrics in records[parent.replaces].history}
        lent = {metrics["step"]: metrics["eval_loss"] for metrics in records[parent.number].history}
        assert lent[parent.step] < left[parent.step]
    assert any(records[number].sampled != records[parent.number].sampled for number, parent in found.items())


def test_no_trial_is_told_twice_at_a_rung_nor_at_its_parent_s(search: tuple[SearchStudy, list[Moment]]) -> None:
    found = children(search[0])
    for trial in search[0].study.trials:
        rungs = [int(key.rpartition("_")[2]) for key in trial.user_attrs if key.startswith("population_rung_")]
        first = found[trial.number].rung + 1 if trial.number in found else 1
        assert rungs == list(range(first, first + len(rungs)))
        assert all(step > 2 * (first - 1) for step in trial.intermediate_values)


def test_the_same_seed_tells_the_same_and_another_something_else(tmp_path: Path) -> None:
    cases = (("a", 1), ("b", 1), ("c", 2))
    studies, told = zip(*(searched(tmp_path / name, f"study.seed={seed}") for name, seed in cases), strict=True)
    assert told[0] == told[1] != told[2]
    assert children(studies[0]) == children(studies[1]) != {}


def test_the_checkpoints_that_are_lent_are_few_and_go_with_the_end(tmp_path: Path) -> None:
    study, _ = searched(tmp_path, "study.population=8")
    lent = [len(list(rung.iterdir())) for rung in Layout(tmp_path).lent("s").iterdir()]
    assert len(lent) == 4
    assert max(lent) == 2
    study.discard_examples()
    assert not Layout(tmp_path).lent("s").exists()


def test_a_study_that_had_ended_goes_on_with_new_lenders(tmp_path: Path) -> None:
    study, _ = searched(tmp_path)
    before = children(study)
    study.discard_examples()
    again = opened(tmp_path, "study.num_trials=40", storage=study.study._storage)
    simulate(again, curve, workers=4)
    assert {record.status for record in again.records()} == {Status.COMPLETE, Status.PRUNED}
    parents = [parent.number for number, parent in children(again).items() if number not in before]
    assert parents
    assert min(parents) >= 24
    again.release()


def test_what_a_person_asks_for_comes_before_a_place_is_taken(tmp_path: Path) -> None:
    study = opened(tmp_path)
    while not any(record.status is Status.PRUNED for record in study.records()):
        (number,) = study.next_trials()
        told = [dict(metrics) for metrics in curve(study.config(number))]
        for index in range(len(told)):
            _write(study.folder(number), told[: index + 1], study)
            if study.report(number, told[index]) is not Status.RUNNING:
                break
    enqueue(study.study, {"rho": 0.5})
    (asked,), (child,) = study.next_trials(), study.next_trials()
    assert study.record(asked).parent is None
    assert study.config(asked).rho == 0.5
    assert study.record(child).parent is not None
    assert CHANGED in study.folder(child).state()
    study.release()


def test_a_trial_whose_parent_s_checkpoint_is_gone_is_not_begun_as_another(tmp_path: Path) -> None:
    study, _ = searched(tmp_path)
    number, parent = next(iter(children(study).items()))
    study.discard_examples()
    shutil.rmtree(study.folder(number).path)
    assert study._population is not None
    with pytest.raises(MachineError, match=rf"^trial {number}: cannot go on from .*/{parent.number:04d} \(No such"):
        study._population.hand_on(number)


def test_a_search_pays_for_no_training_twice(search: tuple[SearchStudy, list[Moment]]) -> None:
    study, moments = search
    again = opened(study.layout.storage_path, "study.max_device_hours=100", storage=study.study._storage)
    assert children(study)
    for one in (study, again):
        assert one.budget.device_hours() * 3600 == pytest.approx(sum(moment.seconds for moment in moments))


class Killed(BaseException):
    """What a killed process does not catch."""


class Mortal(InMemoryStorage):
    """A database whose writer is killed before each write, the first time that it is about to do it."""

    def __init__(self) -> None:
        super().__init__()
        self.survived: set[str] | None = None

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("set_") or name == "create_new_trial":
            return lambda *values, **named: self.write(name, found, values, named)
        return found

    def write(self, name: str, method: Callable[..., Any], values: tuple[Any, ...], named: dict[str, Any]) -> Any:
        key = f"{name}{values}" if name.startswith("set_") else f"{name}{len(self.get_all_trials(0))}"
        # How long a search has run is told anew by each process.
        if self.survived is not None and key not in self.survived and RUN not in values:
            self.survived.add(key)
            raise Killed
        return method(*values, **named)


def test_a_kill_before_each_write_changes_nothing(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole", "study.num_trials=16")
    simulate(whole, curve, workers=1)
    storage, survived, kills = Mortal(), set[str](), 0
    while True:
        storage.survived = None
        study = opened(tmp_path / "killed", "study.num_trials=16", storage=storage)
        storage.survived = survived
        try:
            simulate(study, curve, workers=1)
            break
        except Killed:
            kills += 1
            study.release()
    told = [[(t.number, t.state, t.params, t.values, t.user_attrs) for t in s.study.trials] for s in (study, whole)]
    assert told[0] == told[1]
    assert kills > 16 * 8
    assert len(children(study)) >= 2
    assert {study.folder(n).state()["history"][0]["step"] == p.step + 1 for n, p in children(study).items()} == {True}


def test_of_equals_none_ends_and_what_is_no_number_is_the_worst(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.num_trials=9")
    statuses = []
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 2.0, math.nan, 1.0):
        (number,) = study.next_trials()
        told = {"step": 2, "max_steps": 9, "train_runtime": 2.0, "eval_loss": loss}
        statuses.append(study.report(number, told))
    stopped = [number for number, status in enumerate(statuses) if status is Status.PRUNED]
    assert stopped == [5, 7]
    study.release()


def test_only_what_may_change_amid_a_training_does_and_stays_in_its_range() -> None:
    searches = space("auxiliary_learning_rate=2 * learning_rate", "lora_alpha={choice: [8, 16]}")
    inherited = {"rho": 0.9, "learning_rate": 0.001, "rank": 4, "weight_decay": 0.01, "lora_alpha": 8}
    found = [offspring(searches, inherited, seed) for seed in range(200)]
    assert found == [offspring(searches, inherited, seed) for seed in range(200)]
    assert {(one["rank"], one["lora_alpha"]) for one in found} == {(4, 8)}
    assert all(0.01 <= one["rho"] <= 1 and 1e-4 <= one["learning_rate"] <= 1e-2 for one in found)  # type: ignore[operator]
    near = [one["rho"] for one in found if one["rho"] in (pytest.approx(0.72), 1.0)]
    assert 120 <= len(near) <= 180  # 150 are expected
    assert {one["weight_decay"] for one in found} == {0, 0.01, 0.1}
    assert changed(searches, inherited, {**inherited, "learning_rate": 0.002}) == {
        "learning_rate": 0.002,
        "auxiliary_learning_rate": 0.004,
    }


def test_what_something_else_is_derived_from_stays() -> None:
    searches = space("lora_alpha=1000 * learning_rate")
    inherited = {"rho": 0.5, "learning_rate": 0.001, "rank": 4, "weight_decay": 0.01}
    assert {offspring(searches, inherited, seed)["learning_rate"] for seed in range(20)} == {0.001}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["study.finalists=2"], "finalists: trials of pbt change settings amid their training"),
        (["study.sampler=grid"], "with pbt not each number is a combination"),
        (["study.population=3"], "population: .*greater than or equal to 4"),
        (["study.scheduler=asha", "study.population=9"], r"study\.population: scheduler asha does not read it"),
        (
            ["study.objectives=[{metric: eval_loss}, {metric: train_runtime}]"],
            "scheduler: pbt takes one objective",
        ),
        (
            ["rho=0.1", "learning_rate=0.001", "weight_decay=0"],
            "pbt changes settings amid a training; search one of .*learning_rate",
        ),
    ],
)
def test_what_no_population_can_do_is_refused(given: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        space(*given)


def test_a_lineage_is_shown(search: tuple[SearchStudy, list[Moment]], capsys: pytest.CaptureFixture[str]) -> None:
    study, _ = search
    number, parent = next(iter(children(study).items()))
    print_leaderboard(Console(width=160), study.records(), study.objectives)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    assert any(line[:3] == ["trial", "status", "from"] for line in lines)
    line = next(line for line in lines if line[0] == str(number))
    assert f"{parent.number} at {parent.step}" in " ".join(line)
    records = study.records()
    assert as_json(records[number], "eval_loss")["parent"] == vars(parent)
    assert "parent" not in as_json(records[0], "eval_loss")
