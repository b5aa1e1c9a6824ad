"""What a study remembers of the evaluations of its trials.

Of one objective it is Optuna's intermediate values. Optuna takes none of several objectives: then each evaluation is an
attribute of its trial, with all that the trial is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from optuna.trial import FrozenTrial, Trial

from bilora_ray.records import Objective
from bilora_ray.search.space import LIMITED, StudyConfig

EVALUATION = "evaluation_"
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
