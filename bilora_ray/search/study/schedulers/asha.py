"""Asynchronous successive halving (Li et al., MLSys 2020), whose rungs Optuna keeps in the study database."""

from __future__ import annotations

from optuna.pruners import SuccessiveHalvingPruner

from bilora_ray.search.study.schedulers.base import Asked
from bilora_ray.search.study.schedulers.halving import decided, in_parts, is_stopped, lost_a_rung
from bilora_ray.search.study.schedulers.rungs import first_rung, reached


def is_weak(asked: Asked) -> bool:
    """Whether asynchronous successive halving stops the trial. Rungs and verdicts are kept in the study."""
    now = reached(asked)
    first = max(1, in_parts(first_rung(asked, now), now.unit))
    pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=asked.space.study.reduction_factor)
    weak = lost_a_rung(asked, now, first, lambda trial: True) or is_stopped(asked, pruner, now)
    return decided(asked, now, weak)
