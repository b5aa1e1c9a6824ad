"""What better is: of two values, of two evaluations, of the trials of a study."""

from __future__ import annotations

import math

import pytest

from bilora_ray.records import Objective, is_last

EXACT_MATCH = Objective("eval_exact_match", greater_is_better=True)


@pytest.mark.parametrize(
    ("value", "best", "greater", "expected"),
    [
        (1.0, 2.0, False, True),
        (2.0, 1.0, False, False),
        (1.0, 1.0, False, False),
        (2.0, 1.0, True, True),
        (1.0, 1.0, True, False),
        (1.0, None, True, True),
        (1.0, math.nan, False, True),
        (math.inf, None, False, True),
        (math.nan, None, False, False),
        (math.nan, math.nan, True, False),
        (math.nan, 1.0, True, False),
    ],
)
def test_is_better(value: float, best: float | None, greater: bool, expected: bool) -> None:
    assert Objective("eval_loss", greater).is_better(value, best) is expected


@pytest.mark.parametrize(
    ("value", "loss", "expected"),
    [(0.6, 9.0, True), (0.4, 0.1, False), (0.5, 0.9, True), (0.5, 1.0, False), (0.5, 1.1, False)],
)
def test_of_equal_evaluations_the_one_with_the_lower_loss_is_better(value: float, loss: float, expected: bool) -> None:
    best = {"eval_exact_match": 0.5, "eval_loss": 1.0}
    metrics = {"eval_exact_match": value, "eval_loss": loss}
    assert EXACT_MATCH.improves(metrics, best) is expected
    assert EXACT_MATCH.improves(metrics, None)


@pytest.mark.parametrize(("greater", "expected"), [(True, 3.0), (False, 1.0)])
def test_the_best_value_is_no_nan(greater: bool, expected: float) -> None:
    objective = Objective("eval_loss", greater)
    assert objective.best_value([math.nan, 2.0, 1.0, math.nan, 3.0]) == expected
    assert objective.best_value([math.nan]) is None
    assert objective.best_value([]) is None


@pytest.mark.parametrize(
    ("values", "threshold", "count"),
    [
        ([], 0.0, 0),
        ([3.0], 0.0, 0),
        ([3.0, 2.0, 2.0, 2.5], 0.0, 2),
        ([3.0, 2.9, 2.8], 0.15, 2),  # each is compared with the one before, as transformers does
        ([3.0, 2.9, 2.7], 0.15, 0),
        ([math.nan, 3.0, math.nan], 0.0, 1),
        ([math.nan, math.nan], 0.0, 2),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_evaluations_in_vain_are_those_since_the_last_gain(
    values: list[float], threshold: float, count: int, sign: int
) -> None:
    objective = Objective("m", greater_is_better=sign < 0)
    assert objective.in_vain([{"m": sign * value} for value in values], threshold) == count


@pytest.mark.parametrize(
    ("told", "last"),
    [({}, False), ({"step": 9}, True), ({"patience_left": 1}, False), ({"patience_left": 0}, True)],
)
def test_a_trial_ends_by_itself_with_its_last_step_or_with_its_patience(told: dict[str, float], last: bool) -> None:
    assert is_last({"step": 3, "max_steps": 9, **told}) is last
