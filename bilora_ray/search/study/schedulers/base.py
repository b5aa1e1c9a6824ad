"""What a scheduler is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import Trial

from bilora_ray.records import Objective
from bilora_ray.search.space import Space, Value
from bilora_ray.search.study.looks import attributes_of
from bilora_ray.search.study.warm_start import SPACE

# At each rung one of so many trials goes on, if nobody says otherwise: of one objective, and of several. In as much
# training both find more than with the other (benchmarks/results/search_efficiency.md and objectives.md).
FACTOR, FACTOR_OF_SEVERAL = 2, 3
# Of a trial, the step of the last evaluation after which it was let go on.
JUDGED = "judged"


def factor_unsaid(space: Space) -> int:
    """Of how many trials one goes on at each rung of a study that does not say it."""
    return FACTOR if len(space.objectives) == 1 else FACTOR_OF_SEVERAL


@dataclass(frozen=True)
class Asked:
    """Whether a trial shall stop after its newest evaluation, which the study knows.

    A scheduler remembers in the study database what it decides by, so that a resumed search decides the same.

    Attributes:
        trial: of the study.
        sampled: what the search chose for it.
        metrics: of the evaluation.
        space: the study's.
        objective: the study's.
        choosing: makes a block in which no other process decides anything for the whole study.
    """

    trial: Trial
    sampled: Mapping[str, Value]
    metrics: Mapping[str, float]
    space: Space
    objective: Objective
    choosing: Callable[[], AbstractContextManager[None]]

    @property
    def step(self) -> int:
        """Of the evaluation."""
        return int(self.metrics["step"])

    @property
    def max_steps(self) -> int:
        """The trial's."""
        return int(self.metrics["max_steps"])

    @property
    def factor(self) -> int:
        """At each rung one of so many trials goes on: as the study began, whatever a file leaves unsaid since."""
        begun = self.known.get(SPACE, {}).get("study", {}).get("reduction_factor")
        return int(begun or self.space.study.reduction_factor or factor_unsaid(self.space))

    @cached_property
    def known(self) -> Mapping[str, Any]:
        """What the study had decided for all of its trials as it was asked."""
        return attributes_of(self.trial.study)


def once(is_weak: Callable[[Asked], bool]) -> Callable[[Asked], bool]:
    """`is_weak`, asked once about each evaluation: a resumed trial tells its last one again."""

    def asked_once(asked: Asked) -> bool:
        if asked.trial.user_attrs.get(JUDGED, -1) >= asked.step:
            return False
        weak = is_weak(asked)
        if not weak:
            asked.trial.set_user_attr(JUDGED, asked.step)
        return weak

    return asked_once
