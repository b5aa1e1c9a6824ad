"""What a study remembers of the evaluations of its trials.

Of one objective it is Optuna's intermediate values. Optuna takes none of several objectives: then each evaluation is an
attribute of its trial, with all that the trial is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from bilora_ray.records import Objective
from bilora_ray.search.space import LIMITED, StudyConfig
from bilora_ray.search.study.control.front import fronts

EVALUATION = "evaluation_"
# Of a trial that counts with what it had reached: the budget whose end ended it, or that a person had it stopped.
ENDED_BY = "ended_by"
# Of equal evaluations the one with the lower loss is a trial's best.
LOSS = "eval_loss"


def remember(trial: Trial, metrics: Mapping[str, float], objectives: Sequence[Objective]) -> None:
    """Keep an evaluation, with its `step`, in the study database."""
    step = int(metrics["step"])
    if len(objectives) == 1:
        trial.report(float(metrics[objectives[0].metric]), step)
        return
    judged_by = dict.fromkeys([*(one.metric for one in objectives), LOSS])
    trial.set_user_attr(f"{EVALUATION}{step}", {key: float(metrics[key]) for key in judged_by if key in metrics})


def evaluations_of(trial: FrozenTrial, objectives: Sequence[Objective]) -> dict[int, Mapping[str, float]]:
    """Step -> what the study database knows of the trial's evaluation after it."""
    if len(objectives) == 1:
        return {step: {objectives[0].metric: value} for step, value in trial.intermediate_values.items()}
    attributes = trial.user_attrs.items()
    known = {int(key.removeprefix(EVALUATION)): kept for key, kept in attributes if key.startswith(EVALUATION)}
    return dict(sorted(known.items()))


def best_values(evaluations: Iterable[Mapping[str, float]], objectives: Sequence[Objective]) -> list[float]:
    """What a trial is judged by: all values of the evaluation that is the best by the first objective.

    They are those of one adapter, the one that the trial keeps, and not the best of each objective, which no adapter
    has together.
    """

    def rank(evaluation: Mapping[str, float]) -> tuple[bool, float, float]:
        value = float(evaluation[objectives[0].metric])
        return math.isnan(value), objectives[0].as_loss(value), float(evaluation.get(LOSS, 0.0))

    best = min(evaluations, key=rank)
    return [float(best[one.metric]) for one in objectives]


def losses(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[tuple[float, ...]]:
    """What each of the ended `trials` of a study is sorted by, best first.

    Those that were stopped or ended early come after all that were not, the longest first (as Optuna's TPE has it), and
    those that their own settings made fail, or break a limit, come last. Of several objectives the fronts are sorted.
    """
    signs = [1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in study.directions]
    whole = {
        trial.number: [sign * value for sign, value in zip(signs, trial.values, strict=True)]
        for trial in trials
        if trial.state == TrialState.COMPLETE and not _excess(trial)
    }
    if len(signs) > 1 and whole:
        rows = list(whole)
        places = enumerate(fronts(list(whole.values())))
        whole = {rows[row]: [float(place)] for place, front in places for row in front}
    found: list[tuple[float, ...]] = []
    for trial in trials:
        early = trial.state != TrialState.COMPLETE or trial.user_attrs.get(ENDED_BY) is not None
        if broken := _excess(trial):
            found.append((2.0, broken))
        elif early and trial.intermediate_values:
            step, value = max(trial.intermediate_values.items())
            found.append((1.0, -step, math.inf if math.isnan(value) else signs[0] * value))
        elif trial.number in whole:
            found.append((0.0, *whole[trial.number]))
        else:
            found.append((1.0, 1.0))
    return found


def best_first(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The ended `trials` by their `losses`, of equal ones the earliest first."""
    found = zip(losses(study, trials), trials, strict=True)
    return [trial for _, trial in sorted(found, key=lambda one: (one[0], one[1].number))]


def _excess(trial: FrozenTrial) -> float:
    return sum(max(0.0, value) for value in trial.constraints.values())


def excesses(metrics: Mapping[str, float], study: StudyConfig) -> dict[str, float]:
    """Limit -> by which share of it an evaluation is above it; none or less where it keeps to it."""
    limits = {key: getattr(study, key) for key, metric in LIMITED.items() if metric in metrics}
    return {key: metrics[LIMITED[key]] / limit - 1 for key, limit in limits.items() if limit is not None}


def broken(trial: FrozenTrial, study: StudyConfig) -> str | None:
    """The limits that a trial does not keep to, in a line; None if it keeps to all, as far as is known."""
    above = {key: excess for key, excess in trial.constraints.items() if key in LIMITED and excess > 0}
    lines = (f"{key}: {LIMITED[key]} is {(1 + excess) * getattr(study, key):.4g}" for key, excess in above.items())
    allowed = (f"{getattr(study, key):g} is allowed" for key in above)
    return "; ".join(f"{line}, {most}" for line, most in zip(lines, allowed, strict=True)) or None
