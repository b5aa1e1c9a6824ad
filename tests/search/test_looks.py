"""One look at a study: its trials are read once, what others write is seen in the next, and nothing grows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sqlalchemy import Engine, event

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.looks import Looks, look_again, one_look
from bilora_ray.search.study.samplers import SAMPLERS
from bilora_ray.search.study.schedulers import SCHEDULERS
from bilora_ray.search.study.storage import naming_the_database, open_storage
from bilora_ray.search.study.studies import open_study

BASE = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data")
RANGES = ("rho={low: 0.1, high: 0.9}", "learning_rate={low: 1e-4, high: 1e-2}")
COUNTED = ("rho={low: 0.1, high: 0.9, step: 0.1}", "rank={low: 1, high: 40}")


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """What any database was asked, since the test began."""
    asked: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield asked
    event.remove(Engine, "before_cursor_execute", note)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return optuna.create_study(study_name="s", storage=Looks(open_storage(Layout(tmp_path))))


def other(tmp_path: Path) -> optuna.Study:
    """The same study, as another process has it."""
    return optuna.load_study(study_name="s", storage=open_storage(Layout(tmp_path)))


def test_all_that_a_look_asks_is_one_question(study: optuna.Study, statements: list[str]) -> None:
    trials = [study.ask() for _ in range(3)]
    statements.clear()
    with one_look(study):
        study.get_trials(deepcopy=False)
        once = len(statements)
        for _ in range(5):
            study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            for trial in trials:
                study._storage.get_trial(trial._trial_id)
    assert len(statements) == once > 0


def test_what_is_written_in_a_look_is_known_and_what_is_held_stays(study: optuna.Study, tmp_path: Path) -> None:
    trial = study.ask()
    with one_look(study):
        before = study.get_trials(deepcopy=False)[0]
        trial.suggest_float("x", 0, 1)
        trial.report(0.5, 3)
        trial.set_user_attr("a", 1)
        trial.set_constraint("c", 1.0)
        found = study.get_trials(deepcopy=False)[0]
        assert (before.params, before.intermediate_values, before.user_attrs, before.constraints) == ({}, {}, {}, {})
        study.tell(trial, 0.5)
        ended = study.get_trials(deepcopy=False)[0]
        second = study.ask()
        assert [one.number for one in study.get_trials(deepcopy=False)] == [0, second.number]
    fresh = other(tmp_path).get_trials()[0]
    assert found.intermediate_values == fresh.intermediate_values == {3: 0.5}
    assert found.params == fresh.params
    assert found.distributions == fresh.distributions == {"x": FloatDistribution(0, 1)}
    assert (found.user_attrs, found.constraints) == (fresh.user_attrs, fresh.constraints) == ({"a": 1}, {"c": 1.0})
    assert (ended.state, ended.value, ended.datetime_complete) == (fresh.state, fresh.value, fresh.datetime_complete)


def test_what_another_process_writes_is_seen_in_the_next_look(study: optuna.Study, tmp_path: Path) -> None:
    trial = study.ask()
    elsewhere = other(tmp_path)

    def seen() -> tuple[int, dict[str, int], dict[str, int]]:
        trials = study.get_trials(deepcopy=False)
        return len(trials), trials[0].user_attrs, study.user_attrs

    with one_look(study):
        assert seen() == (1, {}, {})
        elsewhere._storage.set_trial_user_attr(trial._trial_id, "stop", 1)
        elsewhere.ask()
        elsewhere.set_user_attr("stop", 2)
        assert seen() == (1, {}, {})
        look_again(study)
        assert seen() == (2, {"stop": 1}, {"stop": 2})
    elsewhere.tell(1, state=TrialState.FAIL)
    with one_look(study):
        assert study.get_trials(deepcopy=False)[1].state == TrialState.FAIL


def test_a_look_that_finds_nothing_new_asks_nothing(study: optuna.Study, statements: list[str]) -> None:
    study.ask()
    with one_look(study):
        study.get_trials()
    statements.clear()
    for _ in range(5):
        with one_look(study):
            study.get_trials()
    assert not statements


def test_a_database_that_breaks_is_told_of_in_a_line(study: optuna.Study, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.database_file.write_bytes(b"no database" * 10_000)
    with pytest.raises(MachineError, match=r"^study database of .*not a database"), naming_the_database(layout):
        study._storage.look_again()  # type: ignore[attr-defined]


def reads(path: Path, sampler: str, scheduler: str, num_trials: int, statements: list[str]) -> list[int]:
    """How many statements the database was asked for each trial of a simulated search."""
    of_study = {"sampler": sampler, "scheduler": scheduler, "name": "s", "num_trials": num_trials}
    ranges = COUNTED if sampler == "grid" else RANGES
    space = load_space(None, [*BASE, *ranges, *(f"study.{key}={value}" for key, value in of_study.items())])
    begun: list[int] = []

    def curve(config: TrialConfig) -> list[Metrics]:
        begun.append(len(statements))
        told = {"max_steps": 3, "eval_loss": config.rho}
        return [{**told, "step": step, "train_runtime": step * (1 + config.rho)} for step in (1, 2, 3)]

    opened = open_study(space, Layout(path), {})
    try:
        simulate(opened, curve, workers=2)
    finally:
        opened.release()
    return [after - before for before, after in pairwise(begun)]


def test_a_trial_asks_the_database_as_little_at_the_end_of_a_study_as_at_its_beginning(
    tmp_path: Path, statements: list[str]
) -> None:
    found = reads(tmp_path, "tpe", "none", 45, statements)
    assert median(found[-15:]) <= median(found[15:30]) <= 60


PAIRS = [*((sampler, "none") for sampler in SAMPLERS if sampler != "gp"), *(("random", name) for name in SCHEDULERS)]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "scheduler"), PAIRS)
def test_no_sampler_and_no_scheduler_asks_more_as_a_study_grows(
    sampler: str, scheduler: str, tmp_path: Path, statements: list[str]
) -> None:
    found = reads(tmp_path, sampler, scheduler, 220, statements)
    assert median(found[180:]) <= 1.3 * median(found[20:60])
