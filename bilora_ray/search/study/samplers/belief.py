"""What is believed before anything is measured: it leads the first trials, and fades.

A trial draws from the belief with a probability that halves with every few trials, and is proposed as ever else. So a
right belief is used at once and learned from, and a wrong one costs some trials (as in PriorBand, Mallik et al.,
NeurIPS 2023; piBO, Hvarfner et al., ICLR 2022, lets a belief fade too, by the number of trials). Where the trials that
drew from it do no better than the others it has no say. What a trial draws depends on its number alone.
"""

from __future__ import annotations

import math
import zlib
from statistics import NormalDist, median

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from bilora_ray.search.space import Prior, Range, Space, Value, setting_of
from bilora_ray.search.study.control.evaluations import best_first
from bilora_ray.search.study.looks import attributes_of
from bilora_ray.search.study.samplers.base import Planned, given, seed_of
from bilora_ray.search.study.warm_start import WARM_START
from bilora_ray.settings import is_integer

# Of a trial: whether it drew from the belief.
DRAWN = "believed"
# Of the first trials such a share draws from the belief, and half of it after each so many more. Of earlier studies the
# best points run first anyway.
PRIOR, EARLIER = (0.75, 10), (0.5, 4)
# Of trials that draw from the belief, and of others: from so many on they are compared. The median place of the first
# must be this share of the others' or less, or the belief tells nothing.
ENOUGH, NEARER = 2, 0.75
# Near a value that was good elsewhere: this share of the range, on its scale, is the standard deviation.
NEAR = 0.08


def with_belief(sampler: BaseSampler, study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """`sampler` of trial `number`, under what the space or earlier studies say of its settings beforehand."""
    priors = {key: found for key, found in space.distributions.items() if isinstance(found, Range) and found.prior}
    warm = attributes_of(study).get(WARM_START, ()) if space.study.warm_start else ()
    if not (priors or warm) or not _draws(study, space, number):
        return sampler
    ranges, values = dict(priors), {}
    if warm:
        chosen = warm[int(_chance(space, number, WARM_START) * len(warm))]["settings"]
        for key, value in chosen.items():
            found = space.distributions[key]
            if isinstance(found, Range):
                ranges[key] = _around(found, value)
            else:
                values[key] = value
    chances = {key: _chance(space, number, key) if number else None for key in ranges}
    return Planned({**values, **{key: _near(key, found, chances[key]) for key, found in ranges.items()}}, sampler)


def _draws(study: optuna.Study, space: Space, number: int) -> bool:
    """Whether trial `number` draws from the belief, which it remembers: more trials have ended when it is resumed."""
    trial = study.get_trials(deepcopy=False)[number]
    if DRAWN not in trial.system_attrs:
        drawn = believes(space, number) and not refuted(study)
        study._storage.set_trial_system_attr(trial._trial_id, DRAWN, drawn)
        return drawn
    return bool(trial.system_attrs[DRAWN])


def believes(space: Space, number: int) -> bool:
    """Whether trial `number` draws from a belief that holds: the first does, and gets a prior's best guess."""
    first, halved_after = EARLIER if space.study.warm_start else PRIOR
    if number == 0:
        return not space.study.warm_start
    return _chance(space, number, "belief") < first * 0.5 ** (number / halved_after)


def refuted(study: optuna.Study) -> bool:
    """Whether the trials that drew from the belief did no better than the others, of which there are some of each.

    Points that a person gave say nothing of it; those of earlier studies do.
    """
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    earlier = [one["settings"] for one in attributes_of(study).get(WARM_START, ())]
    places: dict[bool, list[int]] = {True: [], False: []}
    told = [trial for trial in ended if DRAWN in trial.system_attrs and (not given(trial) or given(trial) in earlier)]
    for place, trial in enumerate(best_first(study, told), 1):
        places[bool(given(trial)) or trial.system_attrs[DRAWN]].append(place)
    return min(map(len, places.values())) >= ENOUGH and median(places[True]) > NEARER * median(places[False])


def _chance(space: Space, number: int, of: str) -> float:
    """A number from 0 to below 1, the same whenever trial `number` asks."""
    return float(np.random.default_rng([seed_of(space, number), zlib.crc32(of.encode())]).random())


def _around(found: Range, value: float) -> Range:
    """A range with the belief that it is near `value`, which was good elsewhere."""
    if found.log:
        sigma: float | str = f"{(found.high / found.low) ** NEAR}x"
    else:
        sigma = NEAR * (found.high - found.low)
    return found.model_copy(update={"prior": Prior(mean=value, sigma=sigma)})


def _near(key: str, found: Range, chance: float | None) -> Value:
    """The value below which a range's prior has the share `chance` of what lies between the ends; None: its mean."""
    assert found.prior is not None
    value = found.prior.mean
    if chance is not None:
        scale, back = (math.log, math.exp) if found.log else (float, float)
        normal = NormalDist(scale(value), scale(found.prior.width))
        low, high = normal.cdf(scale(found.low)), normal.cdf(scale(found.high))
        value = back(normal.inv_cdf(min(max(low + chance * (high - low), 1e-12), 1 - 1e-12)))
    return found.nearest(value, is_integer(setting_of(key)))
