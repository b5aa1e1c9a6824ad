"""The settings of a trial that goes on from another's checkpoint: that one's, some of them a little different."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bilora_ray.search.space import Choice, Space, Value, setting_of
from bilora_ray.settings import AMID, is_integer

# As the paper's "perturb" and "resample" are, of its experiments on machine translation and on GANs.
FACTORS, ANEW = (0.8, 1.2), 0.25


def offspring(space: Space, inherited: Mapping[str, Value], seed: int) -> dict[str, Value]:
    """Optuna's parameters of a trial that goes on from one with those `inherited`.

    Only what may change amid a training does, and nothing that would have what is derived from it change otherwise.
    """
    random, found = np.random.default_rng(seed), dict(inherited)
    for name in space.changing:
        if name in inherited:
            values = {**found, name: _other(space, name, inherited[name], random)}
            if changed(space, inherited, values).keys() <= AMID:
                found = values
    return found


def changed(space: Space, inherited: Mapping[str, Value], parameters: Mapping[str, Value]) -> dict[str, Any]:
    """Setting -> its value in a trial with `parameters`, of those that a trial with the `inherited` has otherwise."""
    before, now = (space.trial_config(values).model_dump(mode="json") for values in (inherited, parameters))
    return {key: value for key, value in now.items() if value != before[key]}


def _other(space: Space, name: str, value: Value, random: np.random.Generator) -> Value:
    distribution, anew = space.distributions[name], random.random() < ANEW
    if isinstance(distribution, Choice):
        count = len(distribution.choice)
        if anew:
            return distribution.choice[int(random.integers(count))]
        place = distribution.choice.index(value) + int(random.choice((-1, 1)))
        return distribution.choice[min(max(place, 0), count - 1)]
    whole = is_integer(setting_of(name))
    if anew:
        return distribution.at(float(random.random()), whole)
    assert isinstance(value, int | float)
    return distribution.nearest(value * float(random.choice(FACTORS)), whole)
