"""Parzen estimators of all settings together (Bergstra et al., NeurIPS 2011; Falkner et al., ICML 2018)."""

from __future__ import annotations

import math

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState

from bilora_ray.search.space import Space
from bilora_ray.search.study.samplers import random
from bilora_ray.search.study.samplers.base import ForOneTrial, startup_trials

# The share of trials that Optuna's TPE takes for good.
BEST = 0.1
# Of several objectives one of so many trials is drawn at random where there are early stops, as in BOHB (Falkner et
# al.): they may leave complete trials in one part of the front alone, where all further ones would be then.
RANDOM_ONE_OF = 3


def sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """Of trial `number`; random while what is no good would be among the best."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    several = len(study.directions) > 1
    # Of several objectives Optuna ranks the trials that are complete only.
    states = {TrialState.COMPLETE} if several else {TrialState.COMPLETE, TrialState.PRUNED}
    worked = sum(trial.state in states and max(trial.constraints.values(), default=0) <= 0 for trial in ended)
    stops = space.study.scheduler != "none"
    if worked < math.ceil(BEST * len(ended)) or (several and stops and number % RANDOM_ONE_OF == 0):
        return random.sampler(study, space, number)
    startup = startup_trials(space)

    def make(seed: int) -> BaseSampler:
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)

    return ForOneTrial(space, number, make)
