"""How far a trial has come, and the first rung: both in the unit of which trials are compared after as much.

That is training rows as a rule, so that trials of different batches are compared after as much training. Studies of
version 0.1.0 have their rungs in steps, and go on with those.
"""

from __future__ import annotations

from dataclasses import dataclass

from bilora_ray.search.study.schedulers.base import Asked
from bilora_ray.search.study.view import STOPPED

# In the study: the first rung of version 0.1.0, in steps; and in a unit, of which others ask: the first, the longest.
FIRST_STEPS, FIRST, LONGEST = "grace_period", "grace_{}", "longest_{}"
# Unit -> the metric of an evaluation that tells it, where settings do not.
TOLD = {"epochs": "epoch", "tokens": "num_input_tokens_seen", "seconds": "train_runtime"}


@dataclass(frozen=True)
class Reached:
    """How far a trial has come.

    Attributes:
        unit: of all that is said here.
        amount: that the trial has had.
        a_step: what a step of it takes: of a unit that evaluations tell, the mean until now.
    """

    unit: str
    amount: float
    a_step: float


def reached(asked: Asked) -> Reached:
    """How far the trial has come with its newest evaluation."""
    unit = "steps" if FIRST_STEPS in asked.known else asked.space.study.rung_unit or "rows"
    if unit in TOLD:
        amount = asked.metrics[TOLD[unit]]
        return Reached(unit, amount, amount / asked.step)
    workers = asked.space.resources.workers
    a_step = 1 if unit == "steps" else asked.space.trial_config(asked.sampled).step_rows(workers)
    return Reached(unit, a_step * asked.step, a_step)


def first_rung(asked: Asked, now: Reached) -> float:
    """How much a trial has had at the study's first rung, before which none is stopped."""
    if FIRST_STEPS in asked.known:
        return float(asked.known[FIRST_STEPS])
    space, settings = asked.space, asked.space.study
    key, workers = FIRST.format(now.unit), space.resources.workers
    if key in asked.known:
        return float(asked.known[key])
    if settings.rung_unit is not None and settings.grace_period is not None:
        return settings.grace_period
    if settings.grace_period is not None:
        return agreed(asked, key, settings.grace_period * space.with_step(max).step_rows(workers))
    a_step: float = now.a_step
    if now.unit == "rows":
        # As many steps see fewer rows in smaller batches: of all trials the shortest has a rung, whoever asks first.
        shortest = space.with_step(min)
        a_step = a_step if shortest.max_steps is None else shortest.step_rows(workers)
    # With thirds a ninth would be next, which is too early where a sampler proposes what is alike: of that, ASHA keeps
    # what learns fast, not what ends best (benchmarks/search_efficiency.py). HyperBand has later brackets, and the
    # median stops less.
    latest = asked.factor > 2 and settings.scheduler == "asha" and len(space.objectives) == 1
    part = asked.factor if latest else asked.factor**2
    return agreed(asked, key, max(1, asked.max_steps // part) * a_step)


def longest(asked: Asked, now: Reached) -> float:
    """How much a whole trial takes, as far as the first that was asked about could tell."""
    return agreed(asked, LONGEST.format(now.unit), asked.max_steps * now.a_step)


def noted(asked: Asked, now: Reached, weak: bool) -> bool:
    """`weak`, once the study knows how far a trial came that is."""
    if weak:
        asked.trial.set_user_attr(STOPPED, {now.unit: now.amount})
    return weak


def agreed(asked: Asked, key: str, value: float) -> float:
    """What the study keeps as `key`. Trials may differ in it: the first that any search asks about decides for all."""
    if key in asked.known:
        return float(asked.known[key])
    with asked.choosing():
        study = asked.trial.study
        value = study.user_attrs.get(key, value)
        study.set_user_attr(key, value)
    return value
