"""Points that fill the space evenly, whatever is known: a scrambled Sobol sequence (Owen, 1998), the study's one.

Each setting has a coordinate of its own, those too that only some trials have: where a setting decides about others,
the points on either side of it fill the rest evenly still.
"""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.samplers import BaseSampler

from bilora_ray.search.space import Choice, Distribution, Space, Value, setting_of
from bilora_ray.search.study.samplers import random
from bilora_ray.search.study.samplers.base import Planned, given
from bilora_ray.settings import is_integer


def sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """Of trial `number`: the sequence's next point after those of the trials before it.

    A trial with a point that was given takes none; what that point does not say is drawn at random.
    """
    trials = study.get_trials(deepcopy=False)
    rest = random.sampler(study, space, number)
    if given(trials[number]):
        return rest
    index = sum(not given(trial) for trial in trials[:number])
    return Planned(point(space, index), rest)


def point(
    space: Space, index: int, dimensions: int | None = None, places: Mapping[str, int] | None = None
) -> dict[str, Value]:
    """The values of all settings at point `index` of the study's sequence.

    Args:
        space: of the study.
        index: of the point.
        dimensions: of the sequence; None: as many as the space has distributions.
        places: setting -> its coordinate, which all of its parts have, of which a trial is asked for one; None: each
            distribution has its own, in their order.
    """
    from scipy.stats.qmc import Sobol  # takes half a second to import

    sequence = Sobol(dimensions or len(space.distributions), scramble=True, seed=space.study.seed)
    if index:
        sequence.fast_forward(index)
    coordinates = sequence.random(1)[0]
    return {
        key: _value(key, part, float(coordinates[own if places is None else places[setting_of(key)]]))
        for own, (key, part) in enumerate(space.distributions.items())
    }


def _value(key: str, distribution: Distribution, place: float) -> Value:
    """The value at `place`, which is from 0 to below 1, so that each of several values gets an equal share."""
    whole = is_integer(setting_of(key))
    if isinstance(distribution, Choice):
        return distribution.choice[int(place * len(distribution.choice))]
    count = distribution.count(whole)
    if count is None or distribution.log:
        return distribution.at(place, whole)
    return distribution.nearest(distribution.low + (distribution.step or 1) * int(place * count), whole)
