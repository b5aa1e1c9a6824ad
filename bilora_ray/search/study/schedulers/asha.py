"""Asynchronous successive halving (Li et al., MLSys 2020), whose rungs Optuna keeps in the study database."""

from __future__ import annotations

from contextlib import AbstractContextManager

import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import Trial

from bilora_ray.records import Objective
from bilora_ray.search.space import StudyConfig

GRACE_PERIOD, JUDGED = "grace_period", "judged"
RUNG = "completed_rung_"


def is_weak(
    trial: Trial,
    step: int,
    max_steps: int,
    settings: StudyConfig,
    objective: Objective,
    choosing: AbstractContextManager[None],
) -> bool:
    """Whether asynchronous successive halving stops `trial` after its evaluation at `step`, which the study knows.

    Rungs and verdicts are kept in the study, so a resumed search stops the trials that the first would have stopped. A
    process that died between Optuna's note of a rung and ours of the verdict leaves the rung without one: the
    comparison is made again.

    Args:
        trial: of the study.
        step: of the evaluation.
        max_steps: the trial's.
        settings: the study's.
        objective: the study's.
        choosing: in it no other process decides where the study's first rung is.
    """
    if settings.scheduler == "none" or trial.user_attrs.get(JUDGED, -1) >= step:
        return False
    study = trial.study
    if isinstance(study.pruner, NopPruner):
        with choosing:
            study.pruner = _pruner(study, max_steps, settings)
    weak = trial.should_prune() or _lost_a_rung(trial, step, settings.reduction_factor, objective)
    if not weak:
        trial.set_user_attr(JUDGED, step)
    return weak


def _lost_a_rung(trial: Trial, step: int, reduction_factor: int, objective: Objective) -> bool:
    """Whether the trial was noted at a rung for this evaluation and is not among the best there."""
    own = trial.storage.get_trial(trial._trial_id)
    grace_period = trial.study.user_attrs.get(GRACE_PERIOD, 0)
    for key, value in own.system_attrs.items():
        if not key.startswith(RUNG):
            continue
        rung_step = grace_period * reduction_factor ** int(key.removeprefix(RUNG))
        if own.user_attrs.get(JUDGED, 0) < rung_step <= step:
            trials = trial.study.get_trials(deepcopy=False)
            values = sorted(objective.as_loss(t.system_attrs[key]) for t in trials if key in t.system_attrs)
            if objective.as_loss(value) > values[max(1, len(values) // reduction_factor) - 1]:
                return True
    return False


def _pruner(study: optuna.Study, max_steps: int, settings: StudyConfig) -> BasePruner:
    default = settings.grace_period or max(1, max_steps // settings.reduction_factor**2)
    # Trials may differ in their steps: the first that any search of the study asks about decides for all.
    grace_period = study.user_attrs.get(GRACE_PERIOD, default)
    study.set_user_attr(GRACE_PERIOD, grace_period)
    return SuccessiveHalvingPruner(min_resource=grace_period, reduction_factor=settings.reduction_factor)
