"""What is believed before anything is measured: it leads the first trials, and fades.

A trial draws from the belief with a probability that halves with every few trials, and is proposed as ever else. So a
right belief is used at once and learned from, and a wrong one costs some trials (as in PriorBand, Mallik et al.,
NeurIPS 2023; piBO, Hvarfner et al., ICLR 2022, lets a belief fade too, by the number of trials). It depends on the
trial's number alone: a resumed search draws the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from bilora_ray.config import is_integer
from bilora_ray.search.space import Range, Space, Value, setting_of
from bilora_ray.search.study.samplers.base import seed_of

# Of the first trials so many draw from the belief, and half as many after each HALVED_AFTER trials.
FIRST_SHARE, HALVED_AFTER = 0.75, 10


class Believing(BaseSampler):
    """A sampler whose proposal gives way to the values of a belief.

    Args:
        values: setting -> its value.
        rest: proposes the other settings.
    """

    def __init__(self, values: Mapping[str, Value], rest: BaseSampler) -> None:
        self._values = values
        self._rest = rest

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The settings that `rest` draws together."""
        return self._rest.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Values of those."""
        proposed = self._rest.sample_relative(study, trial, search_space)
        return {key: self._values.get(key, value) for key, value in proposed.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Value:
        """The value of one setting."""
        if param_name in self._values:
            return self._values[param_name]
        value: Value = self._rest.sample_independent(study, trial, param_name, param_distribution)
        return value


def with_belief(sampler: BaseSampler, space: Space, number: int) -> BaseSampler:
    """`sampler` of trial `number`, under what the space says of its settings beforehand."""
    believed = {key: found for key, found in space.distributions.items() if isinstance(found, Range) and found.prior}
    if not believed or not believes(space, number):
        return sampler
    values = {
        key: _near(key, found, _chance(space, number, key) if number else None) for key, found in believed.items()
    }
    return Believing(values, sampler)


def believes(space: Space, number: int) -> bool:
    """Whether trial `number` draws from the belief: the first does, and gets the best guess."""
    return number == 0 or _chance(space, number, "belief") < FIRST_SHARE * 0.5 ** (number / HALVED_AFTER)


def _chance(space: Space, number: int, of: str) -> float:
    """A number from 0 to below 1, the same whenever trial `number` asks."""
    return float(np.random.default_rng([seed_of(space, number), zlib.crc32(of.encode())]).random())


def _near(key: str, found: Range, chance: float | None) -> Value:
    """The value below which a range's prior has the share `chance` of what lies between the ends; None: its mean."""
    assert found.prior is not None
    value = found.prior.mean
    if chance is not None:
        scale, back = (math.log, math.exp) if found.log else (float, float)
        normal = NormalDist(scale(value), scale(found.prior.width))
        low, high = normal.cdf(scale(found.low)), normal.cdf(scale(found.high))
        value = back(normal.inv_cdf(min(max(low + chance * (high - low), 1e-12), 1 - 1e-12)))
    unit = found.step or (1.0 if is_integer(setting_of(key)) else None)
    if unit is not None:
        value = found.low + unit * round((value - found.low) / unit)
    value = min(max(value, found.low), found.high)
    return int(value) if is_integer(setting_of(key)) else value
