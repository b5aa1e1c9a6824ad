"""Early stops: each rule against another way to compute it, in each unit, and over a kill at each write."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import BasePruner, HyperbandPruner, SuccessiveHalvingPruner
from optuna.storages import InMemoryStorage
from tiny_trials import next_trial

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.search.simulated import Metrics, Moment, simulate
from bilora_ray.search.space import READ_BY, Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.schedulers import SCHEDULERS
from bilora_ray.search.study.studies import check_study, open_study
from bilora_ray.search.study.study import SearchStudy

TRIAL = {
    "model_name_or_path": "org/model",
    "task": "causal-lm",
    "train_data": "org/data",
    "rho": "{low: 0.01, high: 1}",
    "per_device_train_batch_size": "{choice: [8, 16]}",
}
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
STOPPING = sorted(set(SCHEDULERS) - {"none"})
ROWS = 1152
UNITS = ("steps", "epochs", "rows", "tokens", "seconds")


def space(trial: dict[str, Any] | None = None, **study: Any) -> Space:
    sections = {"study": {"name": "s", "num_trials": 16, **study}, "trial": {**TRIAL, **(trial or {})}}
    return load_space(None, [f"{name}.{key}={v}" for name, keys in sections.items() for key, v in keys.items()])


def evaluation(step: int, max_steps: int, rows: int, loss: float) -> dict[str, float]:
    """Of a trial whose steps have so many rows: a row is 10 tokens and a tenth of a second, of 576 in an epoch."""
    seen = step * rows
    of_rows = {"epoch": seen / 576, "num_input_tokens_seen": 10 * seen, "train_runtime": seen / 10}
    return {"step": step, "max_steps": max_steps, "eval_loss": loss, **of_rows}


def curve(config: TrialConfig) -> list[Metrics]:
    """Twelve evaluations: best where rho is 0.4, with noise that lasts, and larger radii are behind at first."""
    rows, noise = config.per_device_train_batch_size, math.sin(1000 * config.rho) / 20
    steps, end = config.max_steps or ROWS // rows, abs(config.rho - 0.4) + noise
    told = range(steps // 12, steps + 1, steps // 12)
    return [evaluation(step, steps, rows, end + (0.5 + config.rho) * (1 - step / steps) ** 2) for step in told]


def failing(config: TrialConfig) -> list[Metrics]:
    """As `curve`, but some trials diverge at their second evaluation, and some never measure a number."""
    told, kind = [dict(metrics) for metrics in curve(config)], int(1000 * config.rho) % 5
    if kind == 0:
        told[1]["eval_loss"] = math.inf
    return [{**metrics, "eval_loss": math.nan} for metrics in told] if kind == 1 else told


def run(study: SearchStudy, told: Callable[[TrialConfig], Sequence[Metrics]]) -> None:
    """Run the trials one by one. What was told before an interruption is told again."""
    while (number := next_trial(study)) is not None:
        for metrics in told(study.config(number)):
            if metrics["eval_loss"] == math.inf:
                study.fail(number, "loss is inf", by_settings=True)
                break
            if study.report(number, dict(metrics)) is not Status.RUNNING:
                break


def ends(study: SearchStudy) -> list[tuple[dict[str, Any], Status, int | None]]:
    """Of each trial: its settings, how it ended, and its last step."""
    records, trials = study.records(), study.study.trials
    return [(dict(record.sampled), record.status, trials[record.number].last_step) for record in records]


class Killed(BaseException):
    """What a killed process does not catch."""


class Mortal(InMemoryStorage):
    """A database whose writer is killed before each write, the first time that it is about to do it."""

    def __init__(self) -> None:
        super().__init__()
        self.survived: set[str] = set()
        self.mortal = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("set_") or name == "create_new_trial":
            return lambda *values, **named: self.write(name, found, values, named)
        return found

    def write(self, name: str, method: Callable[..., Any], values: tuple[Any, ...], named: dict[str, Any]) -> Any:
        # How long the search has run is another number at each start.
        told = values[:2] if name == "set_study_user_attr" else values
        key = f"{name}{told}" if name.startswith("set_") else f"{name}{len(self.get_all_trials(0))}"
        if self.mortal and key not in self.survived:
            self.survived.add(key)
            raise Killed
        return method(*values, **named)


def in_memory(searched: Space, layout: Layout, storage: InMemoryStorage) -> SearchStudy:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name="s", storage=storage, direction="minimize", load_if_exists=True)
    opened = SearchStudy(study, searched, layout)
    layout.make("s")
    opened.adopt()
    return opened


@pytest.mark.parametrize("rungs", [{}, {"rung_unit": "tokens"}, {"rung_unit": "steps", "grace_period": 1}])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_kill_before_each_write_changes_nothing(tmp_path: Path, scheduler: str, rungs: dict[str, Any]) -> None:
    settings = {key: value for key, value in rungs.items() if scheduler in READ_BY[key]}
    searched = space(scheduler=scheduler, num_trials=14, **settings)
    undisturbed = in_memory(searched, Layout(tmp_path / "a"), InMemoryStorage())
    run(undisturbed, failing)
    storage, kills = Mortal(), 0
    while True:
        storage.mortal = False
        study = in_memory(searched, Layout(tmp_path / "b"), storage)
        storage.mortal = True
        try:
            run(study, failing)
            break
        except Killed:
            kills += 1
            study.release()
    storage.mortal = False
    assert ends(study) == ends(undisturbed)
    assert kills > 14 * 4
    statuses = [status for _, status, _ in ends(study)]
    assert Status.FAILED in statuses
    assert (Status.PRUNED in statuses) is (scheduler != "none")


def simulated(path: Path, scheduler: str, seed: int, sampler: str = "tpe") -> list[Moment]:
    study = in_memory(space(scheduler=scheduler, seed=seed, sampler=sampler), Layout(path), InMemoryStorage())
    try:
        return simulate(study, curve, workers=4)
    finally:
        study.release()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_same_seed_tells_the_same_in_parallel(tmp_path: Path, scheduler: str) -> None:
    assert simulated(tmp_path / "a", scheduler, 1) == simulated(tmp_path / "b", scheduler, 1)


def by_turns(studies: Sequence[SearchStudy]) -> None:
    """Run one trial in each of `studies`, which are one for several processes, an evaluation by turns."""
    running: dict[int, tuple[int, list[Metrics]]] = {}
    works = True
    while works:
        works = False
        for index, study in enumerate(studies):
            if index not in running:
                number = next_trial(study)
                if number is None:
                    continue
                running[index] = number, list(curve(study.config(number)))
            works = True
            number, left = running[index]
            if study.report(number, left.pop(0)) is not Status.RUNNING:
                del running[index]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_several_processes_decide_as_one_would(tmp_path: Path, scheduler: str) -> None:
    searched, told = space(scheduler=scheduler), []
    for count in (1, 3):
        storage, layout = InMemoryStorage(), Layout(tmp_path / str(count))
        processes = [in_memory(searched, layout, storage) for _ in range(count)]
        by_turns(processes * (3 // count))
        told.append(ends(processes[0]))
    assert told[0] == told[1]
    assert len(told[0]) == 16


@pytest.mark.parametrize("scheduler", STOPPING)
def test_early_stops_save_training_and_keep_the_best_trial_as_a_rule(tmp_path: Path, scheduler: str) -> None:
    kept = 0
    for seed in range(3):
        searches = [simulated(tmp_path / f"{name}{seed}", name, seed, "random") for name in ("none", scheduler)]
        whole, stopped = (sum(moment.seconds for moment in moments) for moments in searches)
        assert stopped < 0.95 * whole
        best, found = (min(moment.metrics["eval_loss"] for moment in moments) for moments in searches)
        kept += found == best
    assert kept >= 2


def by_optuna(pruner: BasePruner, losses: Sequence[Sequence[float]]) -> list[int]:
    """After how many evaluations Optuna stops each of the trials, one after the other."""
    study = optuna.create_study(study_name="s", pruner=pruner)
    counts = []
    for told in losses:
        trial, count = study.ask(), 0
        for step, loss in enumerate(told, start=1):
            trial.report(loss, step)
            count = step
            if step < len(told) and trial.should_prune():
                break
        state = optuna.trial.TrialState.COMPLETE if count == len(told) else optuna.trial.TrialState.PRUNED
        study.tell(trial, min(told[:count]) if count == len(told) else None, state=state)
        counts.append(count)
    return counts


def crossing(trials: int, steps: int) -> list[list[float]]:
    return [
        [math.sin(7 * trial) + math.cos(3 * trial) / step + math.sin(trial * step) / 5 for step in range(1, steps + 1)]
        for trial in range(trials)
    ]


@pytest.mark.parametrize(
    ("scheduler", "pruner"),
    [
        ("asha", SuccessiveHalvingPruner(min_resource=2, reduction_factor=3)),
        ("hyperband", HyperbandPruner(min_resource=2, max_resource=27, reduction_factor=3)),
    ],
)
def test_rungs_in_steps_are_those_of_optuna(tmp_path: Path, scheduler: str, pruner: BasePruner) -> None:
    losses = crossing(40, 27)
    settings = {"rung_unit": "steps", "grace_period": 2, "reduction_factor": 3, "num_trials": 40, "sampler": "random"}
    searched = space(scheduler=scheduler, **settings)
    study = in_memory(searched, Layout(tmp_path), InMemoryStorage())
    counts = []
    for told in losses:
        number, step = next_trial(study), 0
        assert number is not None
        for step, loss in enumerate(told, start=1):
            if study.report(number, evaluation(step, 27, 8, loss)) is not Status.RUNNING:
                break
        counts.append(step)
    assert counts == by_optuna(pruner, losses)
    assert len(set(counts)) >= 4


def after(told: Sequence[tuple[float, float]], amount: float) -> float | None:
    """The best of (amount, loss) until `amount`, of who came so far."""
    return min(loss for at, loss in told if at <= amount) if told[0][0] <= amount <= told[-1][0] else None


def test_the_median_rule_is_that_of_its_words(tmp_path: Path) -> None:
    settings = {"scheduler": "median", "grace_period": 200, "rung_unit": "rows", "min_trials": 3, "num_trials": 40}
    # Trials of 288 to 2304 rows: of what a short one would have had later nothing is known.
    searched = space({"max_steps": "{choice: [36, 144]}"}, **settings)
    study = in_memory(searched, Layout(tmp_path), InMemoryStorage())
    complete: list[list[tuple[float, float]]] = []
    stops = 0
    while (number := next_trial(study)) is not None:
        rows = study.config(number).per_device_train_batch_size
        course: list[tuple[float, float]] = []
        for metrics in curve(study.config(number)):
            status = study.report(number, dict(metrics))
            if status is Status.COMPLETE:
                complete.append(course)
                break
            course.append((rows * metrics["step"], metrics["eval_loss"]))
            amount = course[-1][0]
            others = [best for other in complete if (best := after(other, amount)) is not None]
            best = min(loss for _, loss in course)
            weak = amount >= 200 and len(others) >= 3 and best > statistics.median(others)
            assert (status is Status.PRUNED) is weak
            if weak:
                stops += 1
                break
    assert stops >= 5


def first_stops(unit: str, scheduler: str, grace: float | None, path: Path) -> list[int]:
    """After how many rows each of some trials, each worse than the ones before, is stopped: steps of 8 and of 16."""
    settings = {} if grace is None else {"grace_period": grace}
    minimum = {"min_trials": 1} if scheduler == "median" else {}
    searched = space(scheduler=scheduler, rung_unit=unit, num_trials=12, **settings, **minimum)
    study = in_memory(searched, Layout(path), InMemoryStorage())
    for number in range(12):
        study.study.enqueue_trial({"per_device_train_batch_size": 8 * (1 + number % 2)})
    stops = []
    while (number := next_trial(study)) is not None:
        rows = study.config(number).per_device_train_batch_size
        for step in range(2, ROWS // rows + 1, 2):
            if study.report(number, evaluation(step, ROWS // rows, rows, 1.0 + number)) is not Status.RUNNING:
                break
        stops.append(step * rows)
    return stops


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize(
    ("unit", "grace", "rows"),
    [
        ("steps", 10, [80, 160]),
        ("epochs", 0.25, [144, 160]),
        ("rows", 144, [144, 160]),
        ("tokens", 1440, [144, 160]),
        ("seconds", 14.4, [144, 160]),
    ],
)
def test_trials_are_compared_after_as_much_of_the_unit(
    tmp_path: Path, scheduler: str, unit: str, grace: float, rows: list[int]
) -> None:
    # The first to be compared has steps of 16 rows: an evaluation each 32, where one of 8 has one each 16.
    assert first_stops(unit, scheduler, grace, tmp_path)[:3] == [ROWS, rows[1], rows[0]]


@pytest.mark.parametrize("scheduler", STOPPING)
@pytest.mark.parametrize("unit", UNITS)
def test_no_trial_is_stopped_before_a_share_of_the_first_unless_said(tmp_path: Path, scheduler: str, unit: str) -> None:
    stops, first = first_stops(unit, scheduler, None, tmp_path), ROWS // 4
    # All have as many rows; in steps those with 16 of them are half as long.
    floor = {number: first * (1 + number % 2 if unit == "steps" else 1) for number in range(12)}
    assert all(rows >= floor[number] for number, rows in enumerate(stops))
    assert min(stops) <= 2 * first + 32


def test_a_first_rung_in_steps_of_the_largest_batch_is_where_it_was(tmp_path: Path) -> None:
    searched = space(scheduler="asha", grace_period=9, num_trials=2)
    study = in_memory(searched, Layout(tmp_path), InMemoryStorage())
    run(study, curve)
    assert study.study.user_attrs["grace_rows"] == 9 * 16


@pytest.mark.parametrize(("key", "schedulers"), READ_BY.items())
def test_what_a_scheduler_does_not_read_is_refused(key: str, schedulers: tuple[str, ...]) -> None:
    value = {"rung_unit": "epochs"}.get(key, 4)
    for scheduler in SCHEDULERS:
        if scheduler in schedulers:
            assert getattr(space(scheduler=scheduler, **{key: value}).study, key) == value
        else:
            readers = ", ".join(schedulers)
            line = rf"^--set study\.{key}: scheduler {scheduler} does not read it; allowed with {readers}$"
            with pytest.raises(UserError, match=line):
                space(scheduler=scheduler, **{key: value})


@pytest.fixture
def filed(tmp_path: Path) -> Callable[[str], Path]:
    def write(study: str) -> Path:
        path = tmp_path / "space.yaml"
        trial = "\n".join(f"  {key}: {value}" for key, value in TRIAL.items())
        path.write_text(f"study:\n  name: s\n{study}\ntrial:\n{trial}\n", encoding="utf-8")
        return path

    return write


def test_another_scheduler_may_take_the_place_of_a_file_s(filed: Callable[[str], Path]) -> None:
    path = filed("  grace_period: 3")
    assert load_space(path, ["study.scheduler=none"]).study.scheduler == "none"
    with pytest.raises(UserError, match=r"^--set study\.grace_period: scheduler none does not read it"):
        load_space(path, ["study.scheduler=none", "study.grace_period=3"])
    path = filed("  scheduler: none\n  grace_period: 3")
    with pytest.raises(UserError, match=rf"^{path}: study\.grace_period: scheduler none does not read it"):
        load_space(path)
    assert load_space(path, ["study.scheduler=asha"]).study.grace_period == 3


def test_a_study_goes_on_without_what_its_scheduler_never_read(filed: Callable[[str], Path], tmp_path: Path) -> None:
    layout = Layout(tmp_path / "runs")
    begun = load_space(filed("  grace_period: 3"), ["study.scheduler=none"])
    study = open_study(begun, layout, {})
    next_trial(study)
    study.release()
    check_study(load_space(filed("  scheduler: none")), layout, True, {})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"grace_period": 0.5}, "must be a whole number of steps"),
        ({"grace_period": 1.5, "rung_unit": "rows"}, "must be a whole number of rows"),
        ({"grace_period": 0, "rung_unit": "epochs"}, "should be greater than 0"),
    ],
)
def test_a_first_rung_that_cannot_be_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=rf"^--set study: grace_period: {problem}"):
        space(**settings)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_trial_out_of_patience_is_complete_and_has_its_best_value(tmp_path: Path, scheduler: str) -> None:
    study = in_memory(space(scheduler=scheduler), Layout(tmp_path), InMemoryStorage())
    number = next_trial(study)
    assert number == 0
    told = [{**evaluation(10 * n, 90, 8, loss), "patience_left": left} for n, loss, left in ((1, 2.0, 1), (2, 3.0, 0))]
    assert study.report(0, told[0]) is Status.RUNNING
    # Its process has told the last evaluation, and the search died before it could end the trial.
    study._live[0].report(3.0, 20)
    study.release()
    again = in_memory(study.space, study.layout, study.study._storage)
    assert next_trial(again) == 0
    assert [again.report(0, metrics) for metrics in told] == [Status.RUNNING, Status.COMPLETE]
    assert again.record(0).value == 2.0


def test_a_threshold_without_patience_is_refused() -> None:
    with pytest.raises(UserError, match="early_stopping_threshold: needs early_stopping_patience"):
        space({"early_stopping_threshold": 0.1})
