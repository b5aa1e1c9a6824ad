"""The median rule (Golovin et al., KDD 2017, section 3.2.2), much as Optuna's MedianPruner has it.

A trial is stopped when the best that it has measured so far is worse than the median of what the complete trials had at
their best after as much of the rung unit.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterator

from optuna.trial import FrozenTrial, TrialState

from bilora_ray.search.study.schedulers.base import Asked
from bilora_ray.search.study.schedulers.rungs import first_rung, noted, reached

# Of a trial: [step, how far it had come, the best that it had measured] of each evaluation, by step.
COURSE = "course"


def is_weak(asked: Asked) -> bool:
    """Whether the trial is worse than the median. What is compared is kept in the study, as it was measured."""
    now = reached(asked)
    best = _measured(asked, now.amount)
    if now.amount < first_rung(asked, now):
        return False
    others = list(_after(asked, now.amount))
    if len(others) < asked.space.study.min_trials:
        return False
    return noted(asked, now, best is None or asked.objective.as_loss(best) > statistics.median(others))


def _measured(asked: Asked, amount: float) -> float | None:
    """The best that the trial has measured, which is added to its course; None: nothing but NaN."""
    own = asked.trial.storage.get_trial(asked.trial._trial_id)
    best = asked.objective.best_value(own.intermediate_values.values())
    before = [point for point in own.user_attrs.get(COURSE, ()) if point[0] < asked.step]
    asked.trial.set_user_attr(COURSE, [*before, [asked.step, amount, best]])
    return best


def _after(asked: Asked, amount: float) -> Iterator[float]:
    """The best of each complete trial after as much, as a loss; those that were shorter tell nothing of it."""
    for other in asked.trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        best = _best_after(other, amount)
        if best is not None:
            yield asked.objective.as_loss(best)


def _best_after(trial: FrozenTrial, amount: float) -> float | None:
    course = trial.user_attrs.get(COURSE, ())
    last = bisect.bisect_right(course, amount, key=lambda point: point[1])
    return course[last - 1][2] if last > 0 and amount <= course[-1][1] else None
