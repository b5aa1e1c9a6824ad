"""Genetic algorithms for several objectives: NSGA-II (Deb et al., 2002) and NSGA-III (Deb and Jain, 2014).

Which generation a trial is of, and who are the parents of one, Optuna keeps in the study. A generation is of trials
that ran to their end: one that was stopped early would not have been a parent.
"""

from __future__ import annotations

import optuna
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler

from bilora_ray.search.space import Space
from bilora_ray.search.study.samplers.base import ForOneTrial, conditional, seed_of

# How large a generation is, which must not change when a study is given more trials.
POPULATION = "population"
SMALLEST, LARGEST = 8, 50
# So many generations a study has, unless they would be too small or too large.
GENERATIONS = 5


def limit(space: Space) -> str | None:
    """Why Optuna would draw settings of `space` at random."""
    for key in conditional(space):
        return f"crosses settings that every trial has, and trial.{key} some have not; write sampler: tpe"
    if space.study.num_trials < 2 * SMALLEST:
        generation = f"the first generation of {SMALLEST} is random"
        return f"{generation}, so that it needs num_trials: {2 * SMALLEST} or more; or write sampler: tpe"
    return None


def second(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """NSGA-II, of trial `number`."""
    return _genetic(NSGAIISampler, study, space, number)


def third(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """NSGA-III, of trial `number`."""
    return _genetic(NSGAIIISampler, study, space, number)


def _genetic(
    kind: type[NSGAIISampler] | type[NSGAIIISampler], study: optuna.Study, space: Space, number: int
) -> BaseSampler:
    size = _population(study, space)

    def make(seed: int) -> NSGAIISampler | NSGAIIISampler:
        return kind(seed=seed, population_size=size)

    # Parents are chosen, and stored, before anything is drawn: who is asked again finds them, and draws the same. And a
    # point that was given, whose settings nobody asks for, is of a generation too.
    first = make(seed_of(space, number))
    trial = study.get_trials(deepcopy=False)[number]
    first.get_parent_population(study, first.get_trial_generation(study, trial))
    return ForOneTrial(space, number, make)


def _population(study: optuna.Study, space: Space) -> int:
    known = study.user_attrs
    if POPULATION not in known:
        study.set_user_attr(POPULATION, max(SMALLEST, min(LARGEST, space.study.num_trials // GENERATIONS)))
        known = study.user_attrs
    return int(known[POPULATION])
