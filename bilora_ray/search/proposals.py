"""What Optuna proposes for a trial, and when it stops one: functions of the study and a trial's number."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import Trial

from bilora_ray.config import is_integer
from bilora_ray.search.space import Choice, Space, StudyConfig, Value

GRACE_PERIOD, JUDGED = "grace_period", "judged"
RUNG = "completed_rung_"


def propose(study: optuna.Study, space: Space, number: int) -> Trial:
    """Trial `number` of `study`, with a value for each setting that its method reads.

    The sampler's seed is decided by the number, so an interrupted trial gets what it would have got, and no two trials
    the same. Values that the trial has already stay.
    """
    study.sampler = _sampler(space, number)
    trial = Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
    sampled: dict[str, Value] = {}
    for key, distribution in space.distributions.items():
        if not space.asked(key, sampled):
            continue
        if isinstance(distribution, Choice):
            sampled[key] = trial.suggest_categorical(key, distribution.choice)
        elif is_integer(key):
            step = int(distribution.step or 1)
            low, high = int(distribution.low), int(distribution.high)
            sampled[key] = trial.suggest_int(key, low, high, step=step, log=distribution.log)
        else:
            sampled[key] = trial.suggest_float(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    return trial


def is_weak(
    trial: Trial, step: int, max_steps: int, settings: StudyConfig, choosing: AbstractContextManager[None]
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
        choosing: in it no other process decides where the study's first rung is.
    """
    if settings.scheduler == "none" or trial.user_attrs.get(JUDGED, -1) >= step:
        return False
    study = trial.study
    if isinstance(study.pruner, NopPruner):
        with choosing:
            study.pruner = _pruner(study, max_steps, settings)
    weak = trial.should_prune() or _lost_a_rung(trial, step, settings.reduction_factor)
    if not weak:
        trial.set_user_attr(JUDGED, step)
    return weak


def _lost_a_rung(trial: Trial, step: int, reduction_factor: int) -> bool:
    """Whether the trial was noted at a rung for this evaluation and is not among the best there."""
    own = trial.storage.get_trial(trial._trial_id)
    grace_period = trial.study.user_attrs.get(GRACE_PERIOD, 0)
    sign = -1 if trial.study.direction == StudyDirection.MAXIMIZE else 1
    for key, value in own.system_attrs.items():
        if not key.startswith(RUNG):
            continue
        rung_step = grace_period * reduction_factor ** int(key.removeprefix(RUNG))
        if own.user_attrs.get(JUDGED, 0) < rung_step <= step:
            trials = trial.study.get_trials(deepcopy=False)
            values = sorted(sign * other.system_attrs[key] for other in trials if key in other.system_attrs)
            if sign * value > values[max(1, len(values) // reduction_factor) - 1]:
                return True
    return False


def _pruner(study: optuna.Study, max_steps: int, settings: StudyConfig) -> BasePruner:
    default = settings.grace_period or max(1, max_steps // settings.reduction_factor**2)
    # Trials may differ in their steps: the first that any search of the study asks about decides for all.
    grace_period = study.user_attrs.get(GRACE_PERIOD, default)
    study.set_user_attr(GRACE_PERIOD, grace_period)
    return SuccessiveHalvingPruner(min_resource=grace_period, reduction_factor=settings.reduction_factor)


def _sampler(space: Space, number: int) -> BaseSampler:
    seed = int(np.random.SeedSequence([space.study.seed, number]).generate_state(1)[0])
    if space.study.sampler == "random":
        return RandomSampler(seed=seed)
    # Optuna's ten random trials before the first modelled one would be most of a small study.
    startup = min(10, max(4, space.study.num_trials // 4))
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
