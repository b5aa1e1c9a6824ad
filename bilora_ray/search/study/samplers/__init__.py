"""What Optuna proposes for a trial, a function of the study and the trial's number: a file a sampler."""

from __future__ import annotations

import optuna
from optuna.trial import Trial

from bilora_ray.config import is_integer
from bilora_ray.search.space import Choice, Space, Value
from bilora_ray.search.study.samplers import random, tpe
from bilora_ray.search.study.samplers.base import Sampler

# What `study.sampler` says -> a sampler for one trial of a study.
SAMPLERS: dict[str, Sampler] = {
    "tpe": tpe.sampler,
    "random": random.sampler,
}


def propose(study: optuna.Study, space: Space, number: int) -> Trial:
    """Trial `number` of `study`, with a value for each setting that its method reads.

    Values that the trial has already stay.
    """
    study.sampler = SAMPLERS[space.study.sampler](study, space, number)
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
