"""What Optuna proposes for a trial, a function of the study and the trial's number: a file a sampler."""

from __future__ import annotations

import optuna
from optuna.trial import Trial

from bilora_ray.errors import UserError
from bilora_ray.search.space import Choice, Space, Value, setting_of
from bilora_ray.search.study.samplers import cmaes, gp, grid, nsga, qmc, random, tpe
from bilora_ray.search.study.samplers.base import Limit, Sampler
from bilora_ray.search.study.samplers.belief import with_belief
from bilora_ray.settings import is_integer

# What `study.sampler` says -> a sampler for one trial of a study.
SAMPLERS: dict[str, Sampler] = {
    "tpe": tpe.sampler,
    "gp": gp.sampler,
    "cmaes": cmaes.sampler,
    "random": random.sampler,
    "grid": grid.sampler,
    "qmc": qmc.sampler,
    "nsga2": nsga.second,
    "nsga3": nsga.third,
}
# Of those that cannot search every space, why.
LIMITS: dict[str, Limit] = {
    "gp": gp.limit,
    "cmaes": cmaes.limit,
    "grid": grid.limit,
    "nsga2": nsga.limit,
    "nsga3": nsga.limit,
}


def check_sampler(space: Space) -> None:
    """Refuse a space that its sampler cannot search, or would search without what it is chosen for.

    Raises:
        UserError: one line with what to write instead.
    """
    name = space.study.sampler
    if space.distributions and name in LIMITS and (why := LIMITS[name](space)) is not None:
        raise UserError(f"{space.path}: study.sampler: {name}: {why}")


def propose(study: optuna.Study, space: Space, number: int) -> Trial:
    """Trial `number` of `study`, with a value for each distribution that it is asked for.

    Values that the trial has already stay.
    """
    study.sampler = with_belief(SAMPLERS[space.study.sampler](study, space, number), study, space, number)
    trial = Trial(study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))
    sampled: dict[str, Value] = {}
    for key, distribution in space.distributions.items():
        if not space.asked(key, sampled):
            continue
        if isinstance(distribution, Choice):
            sampled[key] = trial.suggest_categorical(key, distribution.choice)
        elif is_integer(setting_of(key)):
            step = int(distribution.step or 1)
            low, high = int(distribution.low), int(distribution.high)
            sampled[key] = trial.suggest_int(key, low, high, step=step, log=distribution.log)
        else:
            sampled[key] = trial.suggest_float(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    return trial
