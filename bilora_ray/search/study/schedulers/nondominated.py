"""Successive halving for several objectives (MO-ASHA, Schmucker et al., 2021, https://arxiv.org/abs/2106.12639).

Rungs are those of `asha`. At each the trials are compared by all objectives of the evaluation there: whole fronts go
on, and of the one that is too many those that lie furthest apart.
"""

from __future__ import annotations

from optuna.trial import FrozenTrial

from bilora_ray.search.study.control.evaluations import evaluations_of
from bilora_ray.search.study.control.front import best_rows, losses_of
from bilora_ray.search.study.schedulers.base import JUDGED, Asked
from bilora_ray.search.study.schedulers.rungs import first_rung, reached

# Of a trial at a rung, its step and its losses there.
RUNG = "front_rung_"


def is_weak(asked: Asked) -> bool:
    """Whether the trial is not among the best at a rung that its newest evaluation has reached.

    A process that died between the note of a rung and that of the verdict leaves the rung without one: the comparison
    is made again.
    """
    now = reached(asked)
    first = first_rung(asked, now)
    own = asked.trial.storage.get_trial(asked.trial._trial_id)
    factor, rung = asked.factor, 0
    while first * factor**rung <= now.amount:
        key = f"{RUNG}{rung}"
        if key not in own.user_attrs or own.user_attrs[key]["step"] > own.user_attrs.get(JUDGED, -1):
            _note(asked, own, key)
            if not _is_among_best(asked, key, factor):
                return True
        rung += 1
    return False


def _note(asked: Asked, own: FrozenTrial, key: str) -> None:
    if key not in own.user_attrs:
        objectives = asked.space.objectives
        losses = losses_of(evaluations_of(own, objectives)[asked.step], objectives)
        asked.trial.set_user_attr(key, {"step": asked.step, "losses": losses})


def _is_among_best(asked: Asked, key: str, factor: int) -> bool:
    there = [trial for trial in asked.trial.study.get_trials(deepcopy=False) if key in trial.user_attrs]
    best = best_rows([trial.user_attrs[key]["losses"] for trial in there], max(1, len(there) // factor))
    return asked.trial.number in [there[index].number for index in best]
