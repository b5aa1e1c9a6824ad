"""What the kinds of successive halving share: Optuna keeps their rungs in the study database, and judges by them."""

from __future__ import annotations

import copy
from collections.abc import Callable

from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from bilora_ray.search.space import PARTED
from bilora_ray.search.study.schedulers.base import JUDGED, Asked
from bilora_ray.search.study.schedulers.rungs import TOLD, Reached, noted

RUNG = "completed_rung_"
# Of a trial, how far it had come when it was let go on, where its steps do not tell.
PASSED = "passed"
# Optuna counts in whole numbers: of an epoch or a second it is given such parts.
PARTS = 1_000_000


def in_parts(amount: float, unit: str) -> int:
    """An amount of a unit as a whole number, for Optuna."""
    return round(amount * (PARTS if unit in PARTED else 1))


def is_stopped(asked: Asked, pruner: BasePruner, now: Reached) -> bool:
    """What Optuna's `pruner`, whose resource is `in_parts`, says of a trial that has come so far."""
    trial = asked.trial
    measured = copy.copy(trial.storage.get_trial(trial._trial_id))
    measured.intermediate_values = {in_parts(now.amount, now.unit): measured.intermediate_values[asked.step]}
    return pruner.prune(trial.study, measured)


def lost_a_rung(asked: Asked, now: Reached, first: int, is_rival: Callable[[FrozenTrial], bool]) -> bool:
    """Whether the trial was noted at a rung for this evaluation and is not among the best of its rivals there.

    A process that died between Optuna's note of a rung and ours of the verdict leaves the rung without one: the
    comparison is made again, before Optuna notes the trial at the rung behind.

    Args:
        asked: about the trial.
        now: how far it has come.
        first: where the first rung of the rivals is, `in_parts`.
        is_rival: whether another trial is compared with it.
    """
    own = asked.trial.storage.get_trial(asked.trial._trial_id)
    factor, as_loss = asked.space.study.reduction_factor, asked.objective.as_loss
    passed = own.user_attrs.get(PASSED, own.user_attrs.get(JUDGED, 0) * now.a_step)
    before, here = in_parts(passed, now.unit), in_parts(now.amount, now.unit)
    for key, value in own.system_attrs.items():
        if key.startswith(RUNG) and before < first * factor ** int(key.removeprefix(RUNG)) <= here:
            came = (each for each in asked.trial.study.get_trials(deepcopy=False) if key in each.system_attrs)
            losses = sorted(as_loss(each.system_attrs[key]) for each in came if is_rival(each))
            if as_loss(value) > losses[max(1, len(losses) // factor) - 1]:
                return True
    return False


def decided(asked: Asked, now: Reached, weak: bool) -> bool:
    """`weak`, once the study knows how far a trial came: one that goes on, only if nothing else tells that later."""
    if not weak and now.unit in TOLD:
        asked.trial.set_user_attr(PASSED, now.amount)
    return noted(asked, now, weak)
