"""Each sampler: the same seed and results give the same trials, over kills and in parallel, inside the space."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from cmaes import CMAwM
from optuna.trial import Trial, TrialState
from scipy.stats import qmc as reference

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.search.preflight import SEARCH_ALL
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Choice, Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.evaluations import ENDED_BY, losses
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import LIMITS, SAMPLERS, check_sampler, cmaes, gp, grid, qmc
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.study.study import SearchStudy

BASE = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "method=bilora")
RANGES = ("rho={low: 0.1, high: 0.9}", "learning_rate={low: 1e-5, high: 1e-1, log: true}", "rank={low: 2, high: 8}")
METHODS = ("method={choice: [bilora, lora]}", "rho={low: 0.1, high: 0.9}")
COUNTED = ("rho={low: 0.1, high: 0.4, step: 0.1}", "rank={choice: [4, 8, 16]}")
# What learns, and what of it takes seconds.
LEARNERS = ("tpe", "cmaes", pytest.param("gp", marks=pytest.mark.slow))
KINDS = [*SAMPLERS]
# So many that those that have generations have two of them, and that the process, which takes long, models two.
TRIALS = {"gp": 6, "cmaes": 18, "nsga2": 20, "nsga3": 20}


def space_of(sampler: str, num_trials: int = 0, settings: tuple[str, ...] | None = None, **study: Any) -> Space:
    """A space that `sampler` takes, of trials that run to their end."""
    chosen = settings or (COUNTED if sampler == "grid" else RANGES)
    of_study = {
        "sampler": sampler,
        "name": "s",
        "num_trials": num_trials or TRIALS.get(sampler, 12),
        "scheduler": "none",
        "seed": 3,
        **study,
    }
    return load_space(None, [*BASE, *chosen, *(f"study.{key}={value}" for key, value in of_study.items())])


def loss(config: TrialConfig) -> float:
    """A bowl with its lowest point, 0, at rho 0.3, learning rate 1e-3 and rank 4."""
    away = (config.rho - 0.3) / 0.8, (np.log10(config.learning_rate) + 3) / 4, (config.rank - 4) / 6
    return float(sum(part**2 for part in away))


def curve(config: TrialConfig) -> list[Metrics]:
    """Three evaluations that fall to the loss, in a time that differs from trial to trial."""
    second = 1.0 + config.rho
    return [
        {"step": s, "max_steps": 3, "eval_loss": loss(config) + 1 / s, "train_runtime": s * second} for s in (1, 2, 3)
    ]


class Search:
    """A study whose database is in memory, as a new process sees it each time that it is opened.

    Args:
        space: of the study.
        path: where the trials' folders are.
    """

    def __init__(self, space: Space, path: Path) -> None:
        self.space = space
        self.layout = Layout(path)
        self.layout.make("s")
        self.stored = optuna.create_study(study_name="s")
        for point in space.points_to_evaluate:
            self.stored.enqueue_trial(point)

    @contextmanager
    def opened(self) -> Iterator[SearchStudy]:
        study = SearchStudy(self.stored, self.space, self.layout)
        study.adopt()
        try:
            yield study
        finally:
            study.release()

    def settings(self) -> list[dict[str, Any]]:
        """Those that each trial got."""
        return [trial.params for trial in self.stored.get_trials(deepcopy=False)]


def search(space: Space, path: Path, workers: int = 1) -> list[dict[str, Any]]:
    """The settings that the trials of a whole search got."""
    found = Search(space, path)
    with found.opened() as study:
        simulate(study, curve, workers)
    return found.settings()


def interrupted_search(space: Space, path: Path, interrupt: Callable[[], None]) -> list[dict[str, Any]]:
    """As `search`, in one process a trial, of which `interrupt` may end some."""
    found = Search(space, path)
    while True:
        try:
            interrupt()
            with found.opened() as study:
                numbers = study.next_trials()
                if not numbers:
                    return found.settings()
                for metrics in curve(study.config(numbers[0])):
                    study.report(numbers[0], metrics)
        except KeyboardInterrupt:
            continue


@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_seed_gives_the_same_trials(sampler: str, workers: int, tmp_path: Path) -> None:
    first = search(space_of(sampler), tmp_path / "a", workers)
    assert search(space_of(sampler), tmp_path / "b", workers) == first
    assert search(space_of(sampler, seed=4), tmp_path / "c", workers) != first
    assert len({repr(settings) for settings in first}) == len(first)


@pytest.mark.parametrize("sampler", KINDS)
def test_each_value_is_inside_the_space(sampler: str, tmp_path: Path) -> None:
    space = space_of(sampler)
    for settings in search(space, tmp_path):
        assert settings.keys() == space.distributions.keys()
        for key, value in settings.items():
            distribution = space.distributions[key]
            inside = value in distribution.choice if isinstance(distribution, Choice) else distribution.holds(value)
            assert inside, (key, value)


@pytest.mark.parametrize("sampler", KINDS)
def test_a_process_that_dies_while_a_trial_is_proposed_changes_nothing(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once before each setting of each trial is stored."""
    point = "[{rank: 4}]"
    space = space_of(sampler, points_to_evaluate=point)
    whole = search(space, tmp_path / "whole")
    suggest, until = Trial._suggest, [0]

    def dying(trial: Trial, name: str, distribution: Any) -> Any:
        until[0] -= 1
        if until[0] == 0:
            raise KeyboardInterrupt
        return suggest(trial, name, distribution)

    monkeypatch.setattr(Trial, "_suggest", dying)
    deaths = itertools.cycle([2, 0, 3, 0])
    died = interrupted_search(space, tmp_path / "died", lambda: until.__setitem__(0, next(deaths)))
    assert died == whole


@pytest.mark.slow
@pytest.mark.parametrize("sampler", KINDS)
def test_a_search_that_dies_goes_on_as_if_it_had_not(sampler: str, tmp_path: Path) -> None:
    """In a database of a file, with early stops: each third process dies with a trial just begun."""
    given = "[{rank: 4}]"
    space = space_of(sampler, scheduler="asha", points_to_evaluate=given)

    def whole(path: Path, dies_every: int) -> list[tuple[Any, ...]]:
        study = open_study(space, Layout(path), {})
        for turn in itertools.count(1):
            numbers = study.next_trials()
            if not numbers:
                study.release()
                return [(record.sampled, record.status) for record in study.records()]
            if turn % dies_every == 0:
                study.release()
                study = open_study(space, Layout(path), {})
                assert study.next_trials() == numbers
            for metrics in curve(study.config(numbers[0])):
                if study.report(numbers[0], metrics) is not Status.RUNNING:
                    break
        raise AssertionError("a search has an end")

    assert whole(tmp_path / "died", 3) == whole(tmp_path / "whole", 1000)


def test_settings_that_are_drawn_at_random_are_drawn_apart(tmp_path: Path) -> None:
    run = search(space_of("random", 60), tmp_path)
    places = np.array([[one["rho"], np.log10(one["learning_rate"]), one["rank"]] for one in run])
    assert np.abs(np.corrcoef(places.T) - np.eye(3)).max() < 0.4


def test_cmaes_is_the_library_s_own_search(tmp_path: Path) -> None:
    """One worker, two ranges and a whole number: as a loop of asks and tells, where the user's point is."""
    space = space_of("cmaes", 22, points_to_evaluate="[{rho: 0.7, learning_rate: 0.001, rank: 5}]")
    bounds, step = np.tile([0.0, 1.0], (3, 1)), np.array([0.0, 0.0, 1 / 6])
    optimizer = CMAwM(mean=np.array([0.75, 0.5, 0.5]), sigma=0.2, bounds=bounds, steps=step)
    expected, told = [], []
    for number in range(1, 22):
        if len(told) == 7:
            optimizer.tell(told)
            told = []
        optimizer.reseed_rng(3 + number)
        place, drawn = optimizer.ask()
        settings = {
            "rho": 0.1 + 0.8 * place[0],
            "learning_rate": 10 ** (-5 + 4 * place[1]),
            "rank": round(2 + 6 * place[2]),
        }
        told.append((drawn, loss(space.trial_config(settings))))
        expected.append(settings)
    cmaes._optimizer.cache_clear()
    for found, wanted in zip(search(space, tmp_path)[1:], expected, strict=True):
        assert found == pytest.approx(wanted)


def test_the_gaussian_process_sees_what_was_stopped_early_and_what_failed() -> None:
    study = optuna.create_study(direction="maximize")
    for value, steps, state in ((0.9, 3, "COMPLETE"), (0.8, 3, "COMPLETE"), (0.6, 1, "PRUNED"), (0.7, 2, "PRUNED")):
        trial = study.ask()
        trial.report(value, steps)
        study.tell(trial, value if state == "COMPLETE" else None, getattr(TrialState, state))
    for error in (True, False):
        failed = study.ask()
        if error:
            failed.set_constraint("error", 1.0)
            study.tell(failed, state=TrialState.PRUNED)
        else:
            study.tell(failed, state=TrialState.FAIL)
    trials, values = gp.evidence(study, study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert values[:4, 0].tolist() == [-0.9, -0.8, -0.6, -0.7]
    assert -0.6 < values[4, 0] < 0


def test_the_gaussian_process_models_the_best_and_the_newest_of_many() -> None:
    many = np.linspace(1.0, 2.0, 1000)[:, None]
    assert gp._worth_modelling(many) == [*range(100), *range(900, 1000)]
    assert gp._worth_modelling(many[::-1]) == [*range(800, 1000)]
    assert gp._worth_modelling(many[:200]) == [*range(200)]


def test_trials_are_sorted_as_the_search_values_them() -> None:
    study = optuna.create_study()
    for value, step, state in (
        (0.5, 3, "PRUNED"),
        (0.1, 1, "PRUNED"),
        (2.0, 9, "COMPLETE"),
        (float("nan"), 3, "PRUNED"),
    ):
        trial = study.ask()
        trial.report(value, step)
        study.tell(trial, value if state == "COMPLETE" else None, getattr(TrialState, state))
    failed = study.ask()
    failed.set_constraint("error", 1.0)
    study.tell(failed, state=TrialState.PRUNED)
    by_a_budget = study.ask()  # its value is no better than that of a trial that was stopped there
    by_a_budget.report(0.1, 2)
    by_a_budget.set_user_attr(ENDED_BY, "max_hours")
    study.tell(by_a_budget, 0.1)
    found = losses(study, study.get_trials())
    assert sorted(range(6), key=found.__getitem__) == [2, 0, 3, 5, 1, 4]


def test_trials_of_several_objectives_are_sorted_by_their_fronts() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    for values in ([3.0, 0.1], [1.0, 0.9], [2.0, 0.95], [2.0, 0.5]):
        study.tell(study.ask(), values)
    assert losses(study, study.get_trials()) == [(0.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 1.0)]


def test_qmc_is_one_sequence_whatever_else_is_run(tmp_path: Path) -> None:
    """Of the reference's points, in its order, beside a point that the user gave."""
    space = space_of("qmc", 17, RANGES[:2], points_to_evaluate="[{rho: 0.5, learning_rate: 0.01}]")
    run = search(space, tmp_path, workers=4)[1:]
    places = [[(one["rho"] - 0.1) / 0.8, (np.log10(one["learning_rate"]) + 5) / 4] for one in run]
    expected = reference.Sobol(2, scramble=True, seed=3).random(16)
    assert np.allclose(places, expected, atol=1e-12)
    at_random = np.random.default_rng(0).random((16, 2))
    assert reference.discrepancy(np.array(places)) < 0.5 * reference.discrepancy(at_random)


def test_qmc_gives_each_choice_and_step_its_share() -> None:
    space = space_of("qmc", 64, COUNTED)
    points = [qmc.point(space, index) for index in range(64)]
    for key, shares in (("rho", [16] * 4), ("rank", [21.3] * 3)):
        values = sorted({point[key] for point in points})
        counts = [sum(point[key] == value for point in points) for value in values]
        assert max(abs(count - share) for count, share in zip(counts, shares, strict=True)) <= 2


def test_qmc_draws_the_settings_of_each_method_from_one_sequence(tmp_path: Path) -> None:
    space = space_of("qmc", 8, METHODS)
    run = search(space, tmp_path)
    assert sum("rho" in one for one in run) == 4
    expected = [qmc.point(space, index) for index in range(8)]
    assert run == [
        {key: value for key, value in point.items() if key == "method" or point["method"] == "bilora"}
        for point in expected
    ]


@pytest.mark.parametrize("workers", [1, 4])
def test_grid_runs_each_point_once_those_too_that_the_user_gave(workers: int, tmp_path: Path) -> None:
    given = "[{rank: 8, rho: 0.3}, {rank: 4}, {rank: 4}]"
    run = search(space_of("grid", 12, points_to_evaluate=given), tmp_path, workers)
    assert run[0] == {"rank": 8, "rho": pytest.approx(0.3)}
    assert run[1]["rank"] == run[2]["rank"] == 4
    assert {(one["rank"], round(one["rho"], 9)) for one in run} == set(
        itertools.product((4, 8, 16), (0.1, 0.2, 0.3, 0.4))
    )


def test_grid_has_no_settings_that_a_method_does_not_read() -> None:
    settings = ("method={choice: [lora, bilora]}", "rho={choice: [0.1, 0.2]}", "rank={choice: [4, 8]}")
    points = list(grid.points(space_of("grid", 1, settings)))
    assert len(points) == 2 + 2 * 2
    assert all(("rho" in point) == (point["method"] == "bilora") for point in points)


REFUSED = [
    ("grid", RANGES, 12, r"trial\.rho is a range without a step.*step: .*sampler: qmc"),
    ("grid", COUNTED, 13, r"the grid has 12 points, fewer than the 13 trials; num_trials: 12 runs each once"),
    ("grid", ("rank={low: 1, high: 10001}",), 12, r"more than 10,000 points"),
    ("cmaes", COUNTED, 20, r"trial\.rank is a choice.*{low: 4, high: 16, step: .*log: true}, or sampler: tpe"),
    (
        "cmaes",
        ("rho={low: 0.1, high: 0.9}", "gradient_checkpointing={choice: [true, false]}"),
        20,
        r"trial.gradient_checkpointing is .* write sampler: tpe",
    ),
    ("cmaes", RANGES, 13, r"num_trials: 14 or more"),
    ("nsga2", RANGES, 15, r"num_trials: 16 or more"),
    *((kind, METHODS, 20, r"trial\.rho .*sampler: tpe") for kind in ("gp", "cmaes", "nsga2", "nsga3")),
]


@pytest.mark.parametrize(("sampler", "settings", "num_trials", "why"), REFUSED)
def test_what_a_sampler_cannot_do_is_said_before_anything_starts(
    sampler: str, settings: tuple[str, ...], num_trials: int, why: str
) -> None:
    with pytest.raises(UserError, match=f"^--set: study.sampler: {sampler}: .*{why}") as refusal:
        check_sampler(space_of(sampler, num_trials, settings))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("sampler", KINDS)
def test_what_it_can_do_is_not_refused(sampler: str) -> None:
    check_sampler(space_of(sampler))
    check_sampler(replace(space_of(sampler), distributions={}))


@pytest.mark.parametrize("sampler", LEARNERS)
def test_who_learns_is_ahead_of_random_search(sampler: str, tmp_path: Path) -> None:
    """Of the last ten of forty trials on a bowl, over three seeds, the median loss is less than half."""

    def late(sampler: str) -> float:
        found = []
        for seed in range(3):
            space = space_of(sampler, 40, seed=seed)
            run = search(space, tmp_path / f"{sampler}{seed}")
            found += [loss(space.trial_config(settings)) for settings in run[-10:]]
        return float(np.median(found))

    assert late(sampler) < 0.5 * late("random")


def test_a_sampler_is_looked_at_before_a_start_unless_it_can_search_any_space() -> None:
    assert SAMPLERS.keys() - LIMITS.keys() == SEARCH_ALL
