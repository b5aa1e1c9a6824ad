"""CMA-ES with margin: a normal distribution that follows the best of each generation (Hamano et al., GECCO 2022).

Optuna's own sampler keeps its state as a pickle in the study database, which nobody should read who got the database
from elsewhere, and looks at trials that ran to their end only. Here the state is made anew from what each trial drew,
which the study keeps as numbers; all that counts of results is their order.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
from cmaes import CMAwM
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from bilora_ray.search.space import Choice, Range, Space, Value, setting_of
from bilora_ray.search.study.control.evaluations import losses
from bilora_ray.search.study.samplers import random
from bilora_ray.search.study.samplers.base import Planned, conditional, given
from bilora_ray.settings import is_integer

# Of a trial: its generation, what it drew, and, of the first of a generation, the trials that its parents are.
DRAWN, GENERATION, PARENTS = "drawn", "generation", "parents"
KEY = "cmaes"
# Of a setting's whole range (Loshchilov and Hutter, 2016, search settings of networks so).
SIGMA = 0.2
# What was drawn in one generation, and its order.
Told = tuple[tuple[tuple[float, ...], float], ...]


def limit(space: Space) -> str | None:
    """Why CMA-ES has nothing to follow in `space`."""
    for key in conditional(space):
        return f"moves all settings together, and trial.{key} some trials have not; write sampler: tpe"
    for key, distribution in space.distributions.items():
        if isinstance(distribution, Choice):
            return f"trial.{key} is a choice, which has no order; {_instead(distribution)}"
    generation = population(space)
    if space.study.num_trials < 2 * generation:
        return f"learns once {generation} trials have ended: num_trials: {2 * generation} or more; or sampler: tpe"
    return None


def _instead(distribution: Choice) -> str:
    numbers = [value for value in distribution.choice if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(distribution.choice) or len(numbers) < 2:
        return "write sampler: tpe"
    ends = f"low: {min(numbers):g}, high: {max(numbers):g}"
    return f"write {{{ends}, step: ...}} or {{{ends}, log: true}}, or sampler: tpe"


def population(space: Space) -> int:
    """Trials of a generation (Hansen, 2016)."""
    return 4 + math.floor(3 * math.log(len(space.distributions)))


def sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """Of trial `number`. What a point to evaluate does not say is drawn at random, and teaches nothing."""
    trials = study.get_trials(deepcopy=False)
    rest = random.sampler(study, space, number)
    if given(trials[number]):
        return rest
    own = trials[number].system_attrs.get(KEY) or _place(study, space, trials)
    optimizer = copy.deepcopy(_optimizer(_start(space), _history(study, trials, own)))
    optimizer.reseed_rng((space.study.seed + number) % 2**32)
    evaluated, drawn = optimizer.ask()
    study._storage.set_trial_system_attr(trials[number]._trial_id, KEY, {**own, DRAWN: drawn.tolist()})
    values = {}
    for (key, distribution), place in zip(space.distributions.items(), evaluated, strict=True):
        assert isinstance(distribution, Range)
        values[key] = distribution.at(float(place), is_integer(setting_of(key)))
    return Planned(values, rest)


def _place(study: optuna.Study, space: Space, trials: list[FrozenTrial]) -> dict[str, Any]:
    """The generation of a new trial: the newest, or one more once as many of the newest have ended as it takes."""
    placed = [trial for trial in trials if KEY in trial.system_attrs]
    newest = max((trial.system_attrs[KEY][GENERATION] for trial in placed), default=0)
    ended = [
        trial.number
        for trial in placed
        if trial.system_attrs[KEY][GENERATION] == newest and trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    size = population(space)
    if len(ended) < size:
        return {GENERATION: newest}
    return {GENERATION: newest + 1, PARENTS: ended[:size]}


def _history(study: optuna.Study, trials: list[FrozenTrial], own: dict[str, Any]) -> tuple[Told, ...]:
    """What the generations before that of `own` have drawn, and how good it was."""
    parents = {
        attrs[GENERATION]: attrs[PARENTS]
        for attrs in (*(trial.system_attrs.get(KEY, {}) for trial in trials), own)
        if PARENTS in attrs
    }
    return tuple(
        _told(study, [trials[number] for number in parents[generation]]) for generation in range(1, own[GENERATION] + 1)
    )


def _told(study: optuna.Study, members: list[FrozenTrial]) -> Told:
    found = losses(study, members)
    ranks = {loss: float(rank) for rank, loss in enumerate(sorted(set(found)))}
    return tuple(
        (tuple(member.system_attrs[KEY][DRAWN]), ranks[loss]) for member, loss in zip(members, found, strict=True)
    )


def _start(space: Space) -> tuple[tuple[float, float], ...]:
    """Of each setting where the first generation is, the middle of its range or the first point to evaluate, and a
    step of the setting; both as parts of the range, 0 for a step where it has none."""
    first = space.points_to_evaluate[0] if space.points_to_evaluate else {}
    start = []
    for key, distribution in space.distributions.items():
        assert isinstance(distribution, Range)
        count = None if distribution.log else space.count(key)
        start.append((_place_of(first.get(key), distribution), 1 / (count - 1) if count else 0.0))
    return tuple(start)


def _place_of(value: Value, distribution: Range) -> float:
    if not isinstance(value, int | float):
        return 0.5
    scale = math.log if distribution.log else float
    return (scale(value) - scale(distribution.low)) / (scale(distribution.high) - scale(distribution.low))


@lru_cache(maxsize=4)
def _optimizer(start: tuple[tuple[float, float], ...], history: tuple[Told, ...]) -> CMAwM:
    """Where the search stands after `history`. Whoever draws from it draws from a copy."""
    if not history:
        means, step = np.array(start).T
        bounds = np.tile([0.0, 1.0], (len(start), 1))
        return CMAwM(mean=means, sigma=SIGMA, bounds=bounds, steps=step, seed=0)
    optimizer = copy.deepcopy(_optimizer(start, history[:-1]))
    optimizer.tell([(np.array(drawn), rank) for drawn, rank in history[-1]])
    return optimizer
