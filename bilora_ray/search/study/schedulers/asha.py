"""Asynchronous successive halving (Li et al., MLSys 2020), whose rungs Optuna keeps in the study database."""

from __future__ import annotations

from optuna.pruners import SuccessiveHalvingPruner

from bilora_ray.search.study.schedulers.base import Asked

GRACE_PERIOD, JUDGED = "grace_period", "judged"
RUNG = "completed_rung_"


def is_weak(asked: Asked) -> bool:
    """Whether asynchronous successive halving stops the trial.

    Rungs and verdicts are kept in the study. A process that died between Optuna's note of a rung and ours of the
    verdict leaves the rung without one: the comparison is made again.
    """
    trial = asked.trial
    if trial.user_attrs.get(JUDGED, -1) >= asked.step:
        return False
    first = _first_rung(asked)
    pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=asked.settings.reduction_factor)
    weak = pruner.prune(trial.study, trial.storage.get_trial(trial._trial_id)) or _lost_a_rung(asked, first)
    if not weak:
        trial.set_user_attr(JUDGED, asked.step)
    return weak


def _first_rung(asked: Asked) -> int:
    """Steps to the study's first rung."""
    study, settings = asked.trial.study, asked.settings
    first = study.user_attrs.get(GRACE_PERIOD)
    if first is None:
        default = settings.grace_period or max(1, asked.max_steps // settings.reduction_factor**2)
        # Trials may differ in their steps: the first that any search of the study asks about decides for all.
        with asked.choosing:
            first = study.user_attrs.get(GRACE_PERIOD, default)
            study.set_user_attr(GRACE_PERIOD, first)
    return int(first)


def _lost_a_rung(asked: Asked, first: int) -> bool:
    """Whether the trial was noted at a rung for this evaluation and is not among the best there."""
    own = asked.trial.storage.get_trial(asked.trial._trial_id)
    factor, as_loss = asked.settings.reduction_factor, asked.objective.as_loss
    for key, value in own.system_attrs.items():
        if not key.startswith(RUNG):
            continue
        rung_step = first * factor ** int(key.removeprefix(RUNG))
        if own.user_attrs.get(JUDGED, 0) < rung_step <= asked.step:
            trials = asked.trial.study.get_trials(deepcopy=False)
            losses = sorted(as_loss(other.system_attrs[key]) for other in trials if key in other.system_attrs)
            if as_loss(value) > losses[max(1, len(losses) // factor) - 1]:
                return True
    return False
