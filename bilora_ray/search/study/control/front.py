"""Which trials no other is better than, where several things are looked for.

Everything here is a function of losses: a row a trial, a column an objective, and less is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bilora_ray.records import Objective, Status, TrialRecord


def losses_of(values: Mapping[str, float], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The `values` of the objectives' metrics as losses; NaN is worse than any number."""
    losses = (one.as_loss(values[one.metric]) for one in objectives)
    return tuple(math.inf if math.isnan(loss) else loss for loss in losses)


def front_of(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """The complete trials than which none is better in one objective and as good in all others.

    The best by the first objective comes first. Of equal trials all are there.
    """
    complete = [record for record in records if record.status is Status.COMPLETE]
    losses = [losses_of(record.values, objectives) for record in complete]
    first = next(fronts(losses), [])
    return [complete[index] for index in sorted(first, key=lambda index: (losses[index], complete[index].number))]


def fronts(losses: Sequence[Sequence[float]]) -> Iterator[list[int]]:
    """The rows in fronts: those that no other row dominates, then those that none of the rest does, and so on.

    The non-dominated sorting of Deb et al., IEEE Trans. Evol. Comp. 2002 (https://doi.org/10.1109/4235.996017).
    """
    table = np.asarray(losses, dtype=float)
    # Which row, down, dominates which, across: as good in everything, and better in something.
    as_good = np.ones((len(table), len(table)), dtype=bool)
    better = np.zeros_like(as_good)
    for column in table.T:
        as_good &= column[:, None] <= column
        better |= column[:, None] < column
    dominates = as_good & better
    left = np.arange(len(table))
    while left.size:
        free = ~dominates[np.ix_(left, left)].any(axis=0)
        yield left[free].tolist()
        left = left[~free]


def best_rows(losses: Sequence[Sequence[float]], count: int) -> list[int]:
    """`count` rows: whole fronts, and of the front that has too many those that lie furthest apart.

    The latter is what Schmucker et al., 2021 (https://arxiv.org/abs/2106.12639), found best for early stops: it begins
    with the row that is best in the first objective, and each next one is the furthest from its nearest before it.
    """
    found: list[int] = []
    for front in fronts(losses):
        if len(found) + len(front) > count:
            front = _apart(np.asarray(losses, dtype=float), front, count - len(found))
        found += front
        if len(found) == count:
            break
    return found


def _apart(table: np.ndarray, front: Sequence[int], count: int) -> list[int]:
    rows = table[list(front)]
    low, high = rows.min(axis=0), np.where(np.isfinite(rows), rows, -math.inf).max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    scaled = np.nan_to_num((rows - low) / width, nan=0.0, posinf=2.0)
    chosen: list[int] = []
    nearest = np.full(len(rows), math.inf)
    following = int(np.lexsort(rows.T[::-1])[0])
    while len(chosen) < count:
        chosen.append(following)
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[following], axis=1))
        nearest[chosen] = -1.0
        following = int(np.argmax(nearest))
    return [front[index] for index in chosen]


def hypervolume(losses: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume between the rows' front and `reference`: what a set of trials is worth, more is better.

    A row that is not better than `reference` in everything adds nothing.
    """
    inside = [row for row in losses if all(loss < end for loss, end in zip(row, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(row[0] for row in inside)
    # Slices along the last objective, each with all rows that are as low.
    volume, levels = 0.0, sorted({row[-1] for row in inside})
    for level, above in zip(levels, [*levels[1:], reference[-1]], strict=True):
        slice_ = hypervolume([row[:-1] for row in inside if row[-1] <= level], reference[:-1])
        volume += slice_ * (above - level)
    return volume
