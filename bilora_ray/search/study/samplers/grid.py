"""Each combination of values once, in an order that the study's seed shuffles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from bilora_ray.search.space import Space, Value
from bilora_ray.search.study.samplers import random
from bilora_ray.search.study.samplers.base import Planned, given

# No study runs so many, and all are listed for each trial.
MOST_POINTS = 10_000
Point = Mapping[str, Value]


def limit(space: Space) -> str | None:
    """Why there is no grid over `space`, or one with fewer points than the study has trials."""
    for key in space.distributions:
        if space.count(key) is None:
            instead = "write {low: ..., high: ..., step: ...} or {choice: [...]}, or sampler: qmc, which fills ranges"
            return f"trial.{key} is a range without a step, which has no grid; {instead}"
    count = sum(1 for _, _ in zip(points(space), range(MOST_POINTS + 1), strict=False))
    if count > MOST_POINTS:
        return f"the grid has more than {MOST_POINTS:,} points; give fewer values, or sampler: qmc"
    if space.study.num_trials > count:
        instead = f"num_trials: {count} runs each once"
        return f"the grid has {count} points, fewer than the {space.study.num_trials} trials; {instead}"
    return None


def points(space: Space, settled: Point | None = None) -> Iterator[Point]:
    """All combinations of values, each without the settings that its trial does not have."""
    settled = settled or {}
    following = (key for key in space.distributions if key not in settled and space.asked(key, settled))
    key = next(following, None)
    if key is None:
        yield settled
        return
    for value in space.spread(key, space.count(key) or 0):
        yield from points(space, {**settled, key: value})


def sampler(study: optuna.Study, space: Space, number: int) -> BaseSampler:
    """Of trial `number`: the first point that no trial before it has.

    Of a trial that was given some of its settings, the first point with these.
    """
    left = shuffled(space)
    chosen: Point = {}
    for trial in study.get_trials(deepcopy=False)[: number + 1]:
        wanted = given(trial)
        chosen = next((point for point in left.values() if _agrees(point, wanted)), wanted)
        left.pop(_key(chosen), None)
    return Planned(chosen, random.sampler(study, space, number))


def shuffled(space: Space) -> dict[str, Point]:
    """All points of the grid, in the study's order."""
    ordered = list(points(space))
    order = np.random.default_rng(space.study.seed).permutation(len(ordered))
    return {_key(ordered[index]): ordered[index] for index in order}


def _agrees(point: Point, wanted: Point) -> bool:
    return all(key in point and point[key] == value for key, value in wanted.items())


def _key(point: Point) -> str:
    return repr(sorted(point.items()))
