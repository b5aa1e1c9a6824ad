"""What Optuna proposes for a trial: a function of the study and the trial's number."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from bilora_ray.config import is_integer
from bilora_ray.search.space import Choice, Space, Value

# The share of trials that Optuna's TPE takes for good.
BEST = 0.1


def propose(study: optuna.Study, space: Space, number: int) -> Trial:
    """Trial `number` of `study`, with a value for each setting that its method reads.

    The sampler's seed is decided by the number, so an interrupted trial gets what it would have got, and no two trials
    the same. Values that the trial has already stay.
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


def _seed(space: Space, number: int) -> int:
    return int(np.random.SeedSequence([space.study.seed, number]).generate_state(1)[0])


def _random(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    return RandomSampler(seed=_seed(space, number))


def _tpe(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    worked = sum(not trial.constraints for trial in ended)
    if worked < math.ceil(BEST * len(ended)):  # what failed would be among the best
        return _random(study, space, number)
    # Optuna's ten random trials before the first modelled one would be most of a small study.
    startup = min(10, max(4, space.study.num_trials // 4))
    seed = _seed(space, number)
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


# What `study.sampler` says -> a sampler for one trial of a study: what it draws is decided by the trial's number, so
# that an interrupted trial gets what it would have got.
SAMPLERS: dict[str, Callable[[optuna.Study, Space, int], BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
}
