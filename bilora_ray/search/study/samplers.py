"""What Optuna proposes for a trial: a function of the study and the trial's number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from bilora_ray.config import is_integer
from bilora_ray.search.space import Choice, Space, Value


def propose(study: optuna.Study, space: Space, number: int) -> Trial:
    """Trial `number` of `study`, with a value for each setting that its method reads.

    The sampler's seed is decided by the number, so an interrupted trial gets what it would have got, and no two trials
    the same. Values that the trial has already stay.
    """
    study.sampler = _sampler(study, space, number)
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


def _sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    seed = int(np.random.SeedSequence([space.study.seed, number]).generate_state(1)[0])
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    # While all have failed, the best of them is nothing to go by.
    worked = not all(trial.constraints for trial in ended)
    return SAMPLERS[space.study.sampler if worked else "random"](space, seed)


def _random(space: Space, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _tpe(space: Space, seed: int) -> BaseSampler:
    # Optuna's ten random trials before the first modelled one would be most of a small study.
    startup = min(10, max(4, space.study.num_trials // 4))
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


# What `study.sampler` says -> a sampler for a space, with a seed.
SAMPLERS: dict[str, Callable[[Space, int], BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
}
