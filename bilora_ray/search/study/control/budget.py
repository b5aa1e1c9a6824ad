"""What a search may use: once it has used it, no trial begins, and those that run end at their next evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from bilora_ray.records import Objective
from bilora_ray.search.space import Space
from bilora_ray.search.study.control.evaluations import evaluations_of, excesses
from bilora_ray.search.study.looks import attributes_of
from bilora_ray.search.study.population.lineage import inherited_seconds
from bilora_ray.training.folder import TrialFolder

# The study's attributes: the budget that ended it, and how long it has run; a trial's: for how long it has trained.
END, RUN, TRAINED = "ended", "run", "train_runtime"
# So often at most the study is told how long it has run, which is what a search that is killed forgets.
TICK_S = 10.0
# Of fewer trials no model of what others would be worth is trusted.
FEWEST = 20
HOUR_S = 3600.0


@dataclass(frozen=True)
class Ended:
    """The end of a search by one of its budgets.

    Attributes:
        by: the key of the budget.
        limit: what it allowed. A search that is resumed with another limit goes on.
        line: how that came, for a person.
    """

    by: str
    limit: float
    line: str


def end_of(attributes: Mapping[str, Any], space: Space) -> Ended | None:
    """The end that a study's `attributes` tell of, if the budget of `space` is still that one."""
    told = attributes.get(END)
    if told is None or _limits(space).get(told["by"]) != told["limit"]:
        return None
    return Ended(**told)


def _limits(space: Space) -> dict[str, float]:
    """The budgets that `space` has: key -> limit, that of the cost in the hours that it pays."""
    study = space.study
    limits = {
        "max_hours": study.max_hours,
        "max_device_hours": study.max_device_hours,
        "target": study.target,
        "min_gain": study.min_gain,
    }
    if study.max_cost is not None and study.price_per_gpu_hour is not None:
        limits["max_cost"] = study.max_cost / study.price_per_gpu_hour
    return {key: limit for key, limit in limits.items() if limit is not None}


class Budget:
    """Keeps the account of a study that is run.

    What was used is in the study database, so that a search that is resumed goes on with what is left. Downtime is
    not charged, nor is what a killed trial had not evaluated yet.

    Args:
        study: the Optuna study.
        space: what is searched.
        objective: what trials are judged by.
        folder: a trial's.
        alone: whether no other process may run trials of the study.

    Attributes:
        clock: tells the seconds since some moment that all processes of the study share.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        objective: Objective,
        folder: Callable[[int], TrialFolder],
        alone: bool,
    ) -> None:
        self.clock: Callable[[], float] = time.time
        self._study, self._space, self._objective, self._folder = study, space, objective, folder
        self._limits = _limits(space)
        self._charges = bool(self._limits.keys() & {"max_device_hours", "max_cost"})
        self._began: float | None = None
        self._best: float | None = None
        self._alone = alone
        self._seconds: dict[int, float] | None = None
        self._untold: dict[int, float] = {}
        self._weighed = 0

    def end(self, begins: bool = False) -> Ended | None:
        """The end of the search, if a budget is used up; the study remembers it.

        Args:
            begins: whether a trial is about to begin: only then is it asked what another one may gain.
        """
        attributes = attributes_of(self._study)
        seconds = self._tick(attributes)
        found = end_of(attributes, self._space)
        if found is None:
            found = next(self._used_up(seconds, begins), None)
            if found is not None:
                self._study.set_user_attr(END, asdict(found))
        return found

    def charge(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Take in an evaluation of a running trial, before the trial can end by it."""
        if "target" in self._limits and max(excesses(metrics, self._space.study).values(), default=0) <= 0:
            value = float(metrics[self._metric])
            self._best = value if self._objective.is_better(value, self._best_so_far()) else self._best
        if self._charges and TRAINED in metrics:
            seconds = float(metrics[TRAINED]) - inherited_seconds(trial.user_attrs)
            trial.set_user_attr(TRAINED, seconds)
            if self._seconds is not None:
                self._seconds[trial.number] = seconds

    def device_hours(self) -> float:
        """What the trials have used, up to the last evaluation of each: training time on all devices of its workers.

        A device is a GPU, or a worker that has none.
        """
        resources = self._space.resources
        devices = resources.workers * (resources.gpus_per_worker or 1)
        if self._seconds is None or not self._alone:
            trials = self._study.get_trials(deepcopy=False)
            self._seconds = {trial.number: self._trained(trial) for trial in trials}
        return sum(self._seconds.values()) * devices / HOUR_S

    @property
    def _metric(self) -> str:
        return self._objective.metric

    def _tick(self, attributes: Mapping[str, Any]) -> float:
        """For how many seconds the study has run, by this process and by others, each second once."""
        now = self.clock()
        self._began = now if self._began is None else self._began
        run = attributes.get(RUN, {"seconds": 0.0, "until": now})
        more = max(0.0, now - max(run["until"], self._began))
        seconds = run["seconds"] + more
        if more >= TICK_S or RUN not in attributes:
            self._study.set_user_attr(RUN, {"seconds": seconds, "until": now})
        return seconds

    def _used_up(self, seconds: float, begins: bool) -> Iterator[Ended]:
        for by, limit in self._limits.items():
            line = None
            if by == "max_hours" and seconds >= limit * HOUR_S:
                line = f"{limit:g} h are over"
            elif by == "max_device_hours" and (used := self.device_hours()) >= limit:
                line = f"{used:.3g} of {limit:g} h are used"
            elif by == "max_cost" and (used := self.device_hours()) >= limit:
                price = self._space.study.price_per_gpu_hour or 0.0
                line = f"{used * price:.4g} of {limit * price:g} is spent"
            elif by == "target" and self._reaches(limit):
                line = f"{self._metric} {self._best:.6g} is as good as {limit:g}"
            elif by == "min_gain" and begins and (gain := self._gain()) is not None and gain < limit:
                line = f"no settings promise to be better by {limit:g}"
            if line is not None:
                yield Ended(by, limit, f"{by}: {line}")

    def _reaches(self, target: float) -> bool:
        best = self._best_so_far()
        return best is not None and not self._objective.is_better(target, best)

    def _best_so_far(self) -> float | None:
        if self._best is None:  # also of the trials before this process
            allowed = filter(_keeps_limits, self._study.get_trials(deepcopy=False))
            told = (evaluations_of(trial, self._space.objectives).values() for trial in allowed)
            self._best = self._objective.best_value(metrics[self._metric] for one in told for metrics in one)
        return self._best

    def _trained(self, trial: FrozenTrial) -> float:
        """A trial's training time in seconds; by its folder where it was not charged as it trained."""
        if TRAINED in trial.user_attrs:
            return float(trial.user_attrs[TRAINED])
        if trial.number in self._untold:
            return self._untold[trial.number]
        history = self._folder(trial.number).state().get("history", ())
        seconds = float(history[-1].get(TRAINED, 0.0)) - inherited_seconds(trial.user_attrs) if history else 0.0
        if trial.state.is_finished():
            self._untold[trial.number] = seconds
        return seconds

    def _gain(self) -> float | None:
        """By how much any settings may be better than the best ones so far: a bound that seldom fails.

        It is the regret bound of Makarova et al. (AutoML 2022, https://proceedings.mlr.press/v188/makarova22a.html),
        of a Gaussian process over the complete trials; the same trials give the same bound.

        Returns:
            None where trials are too few, or none has ended since it was asked last.
        """
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        complete = list(filter(_keeps_limits, ended))
        if len(complete) < FEWEST or len(complete) == self._weighed:
            return None
        self._weighed = len(complete)
        # Late: it imports torch.
        from optuna.terminator import RegretBoundEvaluator

        evaluator = RegretBoundEvaluator(min_n_trials=FEWEST, seed=self._space.study.seed)
        return float(evaluator.evaluate(complete, self._study.direction))


def _keeps_limits(trial: FrozenTrial) -> bool:
    return max(trial.constraints.values(), default=0.0) <= 0
