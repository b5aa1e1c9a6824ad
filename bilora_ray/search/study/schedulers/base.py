"""What a scheduler is asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from optuna.trial import Trial

from bilora_ray.records import Objective
from bilora_ray.search.space import Space, Value


@dataclass(frozen=True)
class Asked:
    """Whether a trial shall stop after its newest evaluation, which the study knows.

    A scheduler remembers in the study database what it decides by, so that a resumed search decides the same.

    Attributes:
        trial: of the study.
        sampled: what the search chose for it.
        step: of the evaluation.
        max_steps: the trial's.
        space: the study's.
        objective: the study's.
        choosing: in it no other process decides anything for the whole study.
    """

    trial: Trial
    sampled: Mapping[str, Value]
    step: int
    max_steps: int
    space: Space
    objective: Objective
    choosing: AbstractContextManager[None]
