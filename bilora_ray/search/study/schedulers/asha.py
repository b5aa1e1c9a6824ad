"""Asynchronous successive halving (Li et al., MLSys 2020), whose rungs Optuna keeps in the study database.

A rung is a number of training rows, so that trials of different batches are compared after as much training. Studies of
version 0.1.0 have their rungs in steps, and go on with those.
"""

from __future__ import annotations

import copy

from optuna.pruners import SuccessiveHalvingPruner

from bilora_ray.search.study.schedulers.base import JUDGED, Asked

FIRST_STEPS, FIRST_ROWS = "grace_period", "grace_rows"
RUNG = "completed_rung_"


def is_weak(asked: Asked) -> bool:
    """Whether asynchronous successive halving stops the trial.

    Rungs and verdicts are kept in the study. A process that died between Optuna's note of a rung and ours of the
    verdict leaves the rung without one: the comparison is made again.
    """
    trial = asked.trial
    first, step = first_rung(asked)
    pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=asked.space.study.reduction_factor)
    measured = copy.copy(trial.storage.get_trial(trial._trial_id))
    measured.intermediate_values = {step * at: value for at, value in measured.intermediate_values.items()}
    return pruner.prune(trial.study, measured) or _lost_a_rung(asked, first, step)


def first_rung(asked: Asked) -> tuple[int, int]:
    """The study's first rung, and what a step of the trial is towards it: rows both, or steps in an old study."""
    study, space = asked.trial.study, asked.space
    known = study.user_attrs
    if FIRST_STEPS in known:
        return known[FIRST_STEPS], 1
    workers, settings = space.resources.workers, space.study
    rows = space.trial_config(asked.sampled).step_rows(workers)
    if FIRST_ROWS in known:
        return known[FIRST_ROWS], rows
    if settings.grace_period is not None:
        first = settings.grace_period * space.with_step(max).step_rows(workers)
    else:
        # As many steps see fewer rows in smaller batches: of all trials the shortest has a rung, whoever asks first.
        shortest = space.with_step(min)
        step_rows = rows if shortest.max_steps is None else shortest.step_rows(workers)
        first = max(1, asked.max_steps // settings.reduction_factor**2) * step_rows
    # Trials may differ in their length: the first that any search of the study asks about decides for all.
    with asked.choosing:
        first = study.user_attrs.get(FIRST_ROWS, first)
        study.set_user_attr(FIRST_ROWS, first)
    return first, rows


def _lost_a_rung(asked: Asked, first: int, step: int) -> bool:
    """Whether the trial was noted at a rung for this evaluation and is not among the best there."""
    own = asked.trial.storage.get_trial(asked.trial._trial_id)
    factor, as_loss = asked.space.study.reduction_factor, asked.objective.as_loss
    for key, value in own.system_attrs.items():
        if not key.startswith(RUNG):
            continue
        rung = first * factor ** int(key.removeprefix(RUNG))
        if own.user_attrs.get(JUDGED, 0) * step < rung <= asked.step * step:
            trials = asked.trial.study.get_trials(deepcopy=False)
            losses = sorted(as_loss(other.system_attrs[key]) for other in trials if key in other.system_attrs)
            if as_loss(value) > losses[max(1, len(losses) // factor) - 1]:
                return True
    return False
