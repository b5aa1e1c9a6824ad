"""Asynchronous successive halving (Li et al., MLSys 2020), whose rungs Optuna keeps in the study database."""

from __future__ import annotations

from optuna.pruners import SuccessiveHalvingPruner

from bilora_ray.search.study.schedulers.base import Asked
from bilora_ray.search.study.schedulers.halving import in_parts, is_weak_at_rungs
from bilora_ray.search.study.schedulers.rungs import first_rung, reached


def is_weak(asked: Asked) -> bool:
    """Whether asynchronous successive halving stops the trial. Rungs and verdicts are kept in the study."""
    now = reached(asked)
    first = max(1, in_parts(first_rung(asked, now), now.unit))
    pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=asked.factor)
    return is_weak_at_rungs(asked, now, pruner, first, lambda trial: True)
