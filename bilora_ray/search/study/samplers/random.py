"""Settings drawn independently of all that is known."""

from __future__ import annotations

import optuna
from optuna.samplers import BaseSampler, RandomSampler

from bilora_ray.search.space import Space
from bilora_ray.search.study.samplers.base import ForOneTrial


def sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """Of trial `number`."""
    return ForOneTrial(space, number, lambda seed: RandomSampler(seed=seed))
