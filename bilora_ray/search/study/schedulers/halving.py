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
# Of a trial, how far it had come at the last rung that it was let go on from, where its steps do not tell.
PASSED = "passed"
# Optuna counts in whole numbers: of an epoch or a second it is given such parts.
PARTS = 1_000_000


def in_parts(amount: float, unit: str) -> int:
    """An amount of a unit as a whole number, for Optuna."""
    return round(amount * (PARTS if unit in PARTED else 1))


def is_weak_at_rungs(
    asked: Asked, now: Reached, pruner: BasePruner, first: int, is_rival: Callable[[FrozenTrial], bool]
) -> bool:
    """Whether a kind of successive halving stops a trial. Between rungs nothing is asked of it, and nothing written.

    Args:
        asked: about the trial.
        now: how far it has come.
        pruner: Optuna's, whose resource is `in_parts`.
        first: where the first rung of the rivals is, `in_parts`.
        is_rival: whether another trial is compared with it.
    """
    if _of(asked).user_attrs.get(JUDGED, -1) >= asked.step:  # a resumed trial tells its last evaluation again
        return False
    weak = _lost_a_rung(asked, now, first, is_rival) or _is_stopped(asked, pruner, now)
    if not weak and _rungs_to_judge(asked, now, first):
        if now.unit in TOLD:
            asked.trial.set_user_attr(PASSED, now.amount)
        asked.trial.set_user_attr(JUDGED, asked.step)
    return noted(asked, now, weak)


def _is_stopped(asked: Asked, pruner: BasePruner, now: Reached) -> bool:
    """What Optuna's `pruner`, whose resource is `in_parts`, says of a trial that has come so far."""
    measured = copy.copy(_of(asked))
    measured.intermediate_values = {in_parts(now.amount, now.unit): measured.intermediate_values[asked.step]}
    return pruner.prune(asked.trial.study, measured)


def _lost_a_rung(asked: Asked, now: Reached, first: int, is_rival: Callable[[FrozenTrial], bool]) -> bool:
    """Whether the trial was noted at a rung for this evaluation and is not among the best of its rivals there.

    A process that died between Optuna's note of a rung and ours of the verdict leaves the rung without one: the
    comparison is made again, before Optuna notes the trial at the rung behind.
    """
    factor, as_loss = asked.factor, asked.objective.as_loss
    for key, value in _rungs_to_judge(asked, now, first).items():
        came = (each for each in asked.trial.study.get_trials(deepcopy=False) if key in each.system_attrs)
        losses = sorted(as_loss(each.system_attrs[key]) for each in came if is_rival(each))
        if as_loss(value) > losses[max(1, len(losses) // factor) - 1]:
            return True
    return False


def _rungs_to_judge(asked: Asked, now: Reached, first: int) -> dict[str, float]:
    """The rungs at which the trial is noted and was not let go on yet, with what it had measured there."""
    own, factor = _of(asked), asked.factor
    passed = own.user_attrs.get(PASSED, own.user_attrs.get(JUDGED, 0) * now.a_step)
    before, here = in_parts(passed, now.unit), in_parts(now.amount, now.unit)
    return {
        key: value
        for key, value in own.system_attrs.items()
        if key.startswith(RUNG) and before < first * factor ** int(key.removeprefix(RUNG)) <= here
    }


def _of(asked: Asked) -> FrozenTrial:
    """The trial as the study has it."""
    return asked.trial.storage.get_trial(asked.trial._trial_id)
