"""The Pareto front and what is made of it, compared with what the definitions say word for word."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.search.study.control.front import best_rows, front_of, fronts, hypervolume, losses_of

LOSS, ACCURACY = Objective("eval_loss", greater_is_better=False), Objective("eval_accuracy", greater_is_better=True)
Rows = list[tuple[float, ...]]


def drawn(seed: int, objectives: int, count: int = 40) -> Rows:
    """Rows of few values, so that there are equals."""
    source = random.Random(seed)
    return [tuple(float(source.randrange(8)) for _ in range(objectives)) for _ in range(count)]


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@pytest.mark.parametrize(("seed", "objectives"), itertools.product(range(5), (1, 2, 3)))
def test_a_front_is_what_nothing_that_is_left_dominates(seed: int, objectives: int) -> None:
    rows = drawn(seed, objectives)
    left = set(range(len(rows)))
    for front in fronts(rows):
        assert set(front) == {i for i in left if not any(dominates(rows[j], rows[i]) for j in left)}
        left -= set(front)
    assert not left


@pytest.mark.parametrize(("seed", "count"), itertools.product(range(5), (1, 2, 7, 20, 40)))
def test_the_best_rows_are_whole_fronts_and_of_the_last_those_that_lie_apart(seed: int, count: int) -> None:
    rows = drawn(seed, 2)
    best = best_rows(rows, count)
    assert len(best) == len(set(best)) == count
    taken = 0
    for front in fronts(rows):
        inside = set(front) & set(best)
        assert inside == set(front) or taken + len(inside) == count
        taken += len(inside)


def test_the_ends_of_a_front_are_kept_before_its_middle() -> None:
    line = [(float(x), 100.0 - 10 * x) for x in range(11)]
    assert best_rows(line, 1) == [0]
    assert best_rows(line, 2) == [0, 10]
    assert best_rows(line, 3) == [0, 10, 5]
    # What is infinite in one objective is the furthest, and breaks nothing.
    assert best_rows([(0.0, 1.0), (-1.0, math.inf), (1.0, 0.0)], 2)[0] == 1


@pytest.mark.parametrize(("seed", "objectives"), itertools.product(range(5), (1, 2, 3)))
def test_the_hypervolume_is_the_count_of_the_cells_that_a_row_dominates(seed: int, objectives: int) -> None:
    rows = drawn(seed, objectives, count=6)
    cells = itertools.product(range(9), repeat=objectives)
    covered = sum(any(all(a <= b for a, b in zip(row, cell, strict=True)) for row in rows) for cell in cells)
    assert hypervolume(rows, [9.0] * objectives) == covered
    assert hypervolume(rows, [-1.0] * objectives) == 0
    assert hypervolume([], [1.0] * objectives) == 0


def record(number: int, loss: float, accuracy: float, status: Status = Status.COMPLETE) -> TrialRecord:
    values = {"eval_loss": loss, "eval_accuracy": accuracy}
    return TrialRecord(number, status, {}, {}, value=loss, values=values)


def test_the_front_is_of_complete_trials_whatever_is_better_the_best_by_the_first_objective_first() -> None:
    records = [
        record(0, 2.0, 0.9),
        record(1, 1.0, 0.5),
        record(2, 1.5, 0.5),  # as accurate as 1, with a higher loss
        record(3, 0.1, 1.0, Status.PRUNED),
        record(4, 1.0, 0.5),  # equal to 1
        record(5, 3.0, math.nan),
    ]
    assert [one.number for one in front_of(records, (LOSS, ACCURACY))] == [1, 4, 0]
    assert front_of([records[3]], (LOSS, ACCURACY)) == []
    assert losses_of({"eval_loss": 1.0, "eval_accuracy": math.nan}, (LOSS, ACCURACY)) == (1.0, math.inf)
