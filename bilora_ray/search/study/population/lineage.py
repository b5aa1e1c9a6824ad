"""What the study database knows of a population: who came to which rung with what, who lends, who goes on from whom.

All of it is in the trials' attributes, so that whoever asks next, after a kill or beside this process, knows the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from optuna.trial import FrozenTrial

from bilora_ray.records import Parent

# Of a trial: what it goes on from; its evaluation at a rung; whether its checkpoint of that is kept for others.
PARENT, RUNG, LENT = "parent", "population_rung_{}", "population_lent_{}"


def parent_of(attributes: Mapping[str, Any]) -> Parent | None:
    """What the trial with these `attributes` goes on from; None if it began by itself."""
    return Parent(**attributes[PARENT]) if PARENT in attributes else None


def inherited_seconds(attributes: Mapping[str, Any]) -> float:
    """For how long the trial's forebears had trained, which its evaluations count too."""
    parent = parent_of(attributes)
    return 0.0 if parent is None else parent.seconds


def ranked(trials: Iterable[FrozenTrial], rung: int) -> list[FrozenTrial]:
    """Those that have come to `rung`, the best there first."""
    there = (trial for trial in trials if RUNG.format(rung) in trial.user_attrs)
    return sorted(there, key=lambda trial: (loss_at(trial, rung), trial.number))


def loss_at(trial: FrozenTrial, rung: int) -> float:
    """What the trial had measured at `rung`; of what is no number, nothing is worse."""
    loss = trial.user_attrs[RUNG.format(rung)]["loss"]
    return math.inf if loss is None else float(loss)


def newest_rung(trial: FrozenTrial) -> int:
    """The last rung that the trial has come to by itself; 0 before the first."""
    start = RUNG.format("")
    return max((int(key.removeprefix(start)) for key in trial.user_attrs if key.startswith(start)), default=0)
