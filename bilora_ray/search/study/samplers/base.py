"""What a sampler is: it is made anew for each trial, and the trial's number decides what it draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from bilora_ray.search.space import Space

# The study, its space and the trial's number -> what proposes that trial's settings.
Sampler = Callable[[optuna.Study, Space, int], BaseSampler]


def seed_of(space: Space, number: int) -> int:
    """What trial `number` draws by, so that an interrupted one gets what it would have got, and no two the same."""
    return int(np.random.SeedSequence([space.study.seed, number]).generate_state(1)[0])
