"""A Gaussian process of all settings together, and where it expects to gain most (Optuna's GPSampler, LogEI).

Optuna's looks at trials that ran to their end and at no others. Here it sees, in a study in memory, those too that were
stopped early, each with what it had reached, and those that their own settings made fail, each as the worst.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from bilora_ray.search.space import Space, Value
from bilora_ray.search.study.samplers.base import ForOneTrial, conditional, startup_trials

# The process costs the cube of its trials: of more than so many it has the better half and the newest.
MODELLED = 200
# What is so many times as far above the median as the best is below it, is as bad as can be: a diverged trial's loss
# would make all others look the same.
WORST = 3.0


def limit(space: Space) -> str | None:
    """Why Optuna would draw some settings of `space` at random."""
    for key in conditional(space):
        return f"models settings that every trial has, and trial.{key} some have not; write sampler: tpe"
    return None


def sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """Of trial `number`."""
    known = _known(study, number)
    startup = startup_trials(space)
    return ForOneTrial(space, number, lambda seed: _Process(known, GPSampler(seed=seed, n_startup_trials=startup)))


class _Process(BaseSampler):
    """A GPSampler that looks at a study of its own.

    Args:
        known: that study.
        process: the sampler.
    """

    def __init__(self, known: optuna.Study, process: GPSampler) -> None:
        self._known = known
        self._process = process

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The settings that are drawn together."""
        return self._process.infer_relative_search_space(self._known, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Values of those."""
        asked = self._known.ask()
        return self._process.sample_relative(self._known, self._known.get_trials()[asked.number], search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Value:
        """The value of a setting while too little is known."""
        value: Value = self._process.sample_independent(self._known, trial, param_name, param_distribution)
        return value


def _known(study: optuna.Study, number: int) -> optuna.Study:
    """What is known before trial `number` is proposed, and what runs beside it, as a study to minimise."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    measured, losses = evidence(study, study.get_trials(deepcopy=False, states=states))
    chosen = _worth_modelling(losses)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    known = optuna.create_study(directions=[StudyDirection.MINIMIZE] * len(study.directions))
    known.add_trials(
        create_trial(values=losses[at].tolist(), params=measured[at].params, distributions=measured[at].distributions)
        for at in chosen
    )
    known.add_trials(
        create_trial(state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions)
        for trial in running
        if trial.number != number
    )
    return known


def evidence(study: optuna.Study, trials: Sequence[FrozenTrial]) -> tuple[list[FrozenTrial], NDArray[np.float64]]:
    """Those of the ended `trials` that say something, and the losses of each, one an objective."""
    signs = np.array([1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in study.directions])
    told: list[tuple[FrozenTrial, NDArray[np.float64]]] = []
    for trial in trials:
        if any(value > 0 for value in trial.constraints.values()):
            told.append((trial, np.full(len(signs), np.inf)))
        elif trial.state == TrialState.COMPLETE:
            told.append((trial, signs * np.array(trial.values)))
        elif trial.intermediate_values and len(signs) == 1:
            told.append((trial, signs * trial.intermediate_values[max(trial.intermediate_values)]))
    losses = np.array([loss for _, loss in told]).reshape(len(told), len(signs))
    return [trial for trial, _ in told], _without_outliers(np.where(np.isnan(losses), np.inf, losses))


def _without_outliers(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(losses):
        return losses
    finite = np.where(np.isfinite(losses), losses, np.nan)
    if np.isnan(finite).all():
        return np.zeros_like(losses)
    best, median = np.nanmin(finite, axis=0), np.nanmedian(finite, axis=0)
    # Where most are the best, nothing says how bad the others are.
    worst = np.where(median > best, median + WORST * (median - best), np.nanmax(finite, axis=0) + 1e-9)
    return np.minimum(losses, worst)


def _worth_modelling(losses: NDArray[np.float64]) -> list[int]:
    """Which trials are modelled, in order."""
    if len(losses) <= MODELLED:
        return list(range(len(losses)))
    ranks = losses.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable").sum(axis=1)
    best = set(ranks.argsort(kind="stable")[: MODELLED // 2].tolist())
    rest = [index for index in range(len(losses)) if index not in best]
    return sorted([*best, *rest[-(MODELLED - len(best)) :]])
