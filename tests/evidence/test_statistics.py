"""Paired differences: values by hand, what is alike, what is missing, and whether the words hold, in small."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator

from bilora_ray.evidence.statistics import (
    LEAST_PAIRS,
    MOST_SEEDS,
    Array,
    Difference,
    differences,
    holm,
    power,
    seeds_needed,
)

Noise = Callable[[Generator, tuple[int, int]], Array]
NOISES: dict[str, Noise] = {
    "normal": lambda draw, size: draw.standard_normal(size),
    "heavy-tailed": lambda draw, size: draw.standard_t(3, size),
    "skewed": lambda draw, size: draw.exponential(1, size),
    "accuracies on 200 rows": lambda draw, size: np.round(200 * (0.9 + 0.01 * draw.standard_normal(size))) / 200,
}


def one(baseline: list[float | None], other: list[float | None], **given: int) -> Difference:
    found = differences({"lora": baseline, "other": other}, "lora", **given)["other"]
    assert found is not None
    return found


def test_a_difference_by_hand() -> None:
    found = one([1.0, 1.0, 2.0, 2.0, 3.0], [2.0, 3.0, 5.0, 6.0, 8.0])  # 1, 2, 3, 4, 5
    assert found.mean == 3.0
    assert found.pairs == 5
    # Student's: t = 3 / sqrt(2.5 / 5) = 4.2426 of 4 degrees of freedom; the quantile is 2.7764.
    width = 2.7764451 * math.sqrt(0.5)
    assert found.low <= 3 - width + 1e-6
    assert found.high >= 3 + width - 1e-6
    assert found.high - found.low < 2 * width * 1.4
    assert 0.013235 <= found.p == found.p_holm < 0.05
    assert found.distinguishable


def test_the_other_way_round_all_has_the_other_sign() -> None:
    here, there = (
        one([1.0, 2.0, 4.0, 3.0, 2.5], [1.5, 2.1, 4.9, 3.2, 3.3]),
        one([1.5, 2.1, 4.9, 3.2, 3.3], [1.0, 2.0, 4.0, 3.0, 2.5]),
    )
    assert here.mean == -there.mean
    assert (here.low, here.high) == pytest.approx((-there.high, -there.low))
    assert here.p == there.p


def test_a_difference_does_not_depend_on_who_else_is_compared_nor_on_units() -> None:
    base, other = [0.90, 0.92, 0.91, 0.89, 0.93, 0.90], [0.91, 0.93, 0.93, 0.89, 0.95, 0.90]
    alone = one(base, other)
    beside = differences({"x": base[::-1], "lora": base, "other": other}, "lora")["other"]
    assert beside is not None
    assert (beside.low, beside.high, beside.p) == (alone.low, alone.high, alone.p)
    percent = one([100 * score for score in base], [100 * score for score in other])
    assert percent.low == pytest.approx(100 * alone.low)
    assert percent.p == alone.p


def test_the_same_seed_gives_the_same_numbers() -> None:
    base, other = [1.0, 2.0, 3.0, 4.0, 5.0], [1.2, 2.5, 2.9, 4.4, 5.7]
    assert one(base, other, seed=3) == one(base, other, seed=3)
    assert one(base, other, seed=3).p == pytest.approx(one(base, other, seed=4).p, rel=0.2)


def test_the_interval_leaves_zero_out_where_p_is_below_its_level() -> None:
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        base, shift = draw.standard_normal(8), draw.uniform(0, 2)
        found = one(list(base), list(base + shift + draw.standard_normal(8)))
        seen.add(found.p < 0.05)
        assert (found.p < 0.05) is (found.low > 0 or found.high < 0)
    assert seen == {True, False}


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (-0.5, 34), (0.8, 15), (9.0, LEAST_PAIRS)])
def test_seeds_needed_are_those_of_the_tables(effect: float, seeds: int) -> None:
    assert seeds_needed(effect, 0.05) == seeds


def test_seeds_needed_of_nearly_nothing_are_not_told() -> None:
    assert seeds_needed(0.0, 0.05) is None
    assert seeds_needed(0.02, 0.05) is None
    assert seeds_needed(0.03, 0.05) == 8723
    assert MOST_SEEDS == 10_000


@pytest.mark.parametrize("pairs", [2, 5, 100, 10_000])
@pytest.mark.parametrize("effect", [0.0, 0.1, 1.0, 8.0])
def test_power_is_a_probability_and_is_what_simulation_says(pairs: int, effect: float) -> None:
    found = power(effect, pairs, 0.05)
    assert 0.05 - 1e-9 <= found <= 1
    assert power(effect + 0.1, pairs, 0.05) >= found
    if pairs == 5:
        from scipy.special import stdtrit

        drawn = effect + np.random.default_rng(0).standard_normal((20_000, pairs))
        t = drawn.mean(axis=1) / drawn.std(axis=1, ddof=1) * math.sqrt(pairs)
        assert np.mean(abs(t) > stdtrit(pairs - 1, 0.975)) == pytest.approx(found, abs=0.012)


def test_seeds_needed_are_at_the_level_that_all_that_are_compared_share() -> None:
    base, other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.5, 2.2, 3.9, 3.9, 5.6, 6.3]
    alone = one(base, other)
    many = differences({"lora": base, **{f"other-{place}": other for place in range(5)}}, "lora")["other-0"]
    assert many is not None
    assert alone.seeds_needed is not None
    assert many.seeds_needed is not None
    assert many.seeds_needed > alone.seeds_needed
    assert many.p_holm == pytest.approx(min(1.0, 5 * alone.p))


def test_no_difference_at_all_is_none() -> None:
    scores: list[float | None] = [0.90, 0.91, 0.92, 0.90, 0.93]
    found = one(scores, list(scores))
    assert (found.mean, found.p, found.distinguishable, found.seeds_needed) == (0.0, 1.0, False, None)
    # One in 1 - 0.025^(1/5) = 0.5218 of the seeds could be one step, of 0.01, off.
    assert (found.low, found.high) == pytest.approx((-0.005218, 0.005218), abs=1e-6)


def test_where_all_scores_are_one_number_there_is_no_step() -> None:
    found = one([0.5] * 6, [0.5] * 6)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_equal_differences_are_judged_by_their_sign_alone() -> None:
    base: list[float | None] = [0.90, 0.91, 0.92, 0.90, 0.93, 0.91]
    five, six = (one(base[:count], [score + 0.03 for score in base[:count]]) for count in (5, 6))  # type: ignore[operator]
    assert five.mean == pytest.approx(0.03)
    assert (five.p, six.p) == (2 / 2**5, 2 / 2**6)
    assert (five.distinguishable, six.distinguishable) == (False, True)
    assert five.low == 0.0
    assert six.low == pytest.approx(0.03 - 0.01 * (1 - 0.025 ** (1 / 6)))
    assert (five.seeds_needed, six.seeds_needed) == (6, 6)  # 2 / 2^6 is the first below 0.05


def test_ties_in_most_pairs_tell_nothing() -> None:
    found = one([0.9, 0.9, 0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.905, 0.9, 0.9, 0.9])
    assert not found.distinguishable
    assert found.low < 0 < found.high


def test_a_run_without_a_score_drops_its_pair() -> None:
    base: list[float | None] = [0.90, None, 0.92, 0.94, 0.93, 0.91, 0.90]
    other: list[float | None] = [0.91, 0.99, None, 0.94, math.nan, math.inf, 0.93]
    assert one(base, other) == one([0.90, 0.94, 0.90], [0.91, 0.94, 0.93])


def test_fewer_than_two_pairs_are_no_difference_and_count_for_nothing() -> None:
    base: list[float | None] = [0.90, 0.91, 0.93, 0.90, 0.95]
    other: list[float | None] = [0.91, 0.93, 0.93, 0.92, 0.96]
    found = differences({"lora": base, "other": other, "gone": [0.9, None, None, None, None]}, "lora")
    assert found["gone"] is None
    assert found["other"] == one(base, other)


def test_of_few_pairs_nothing_is_called_distinguishable() -> None:
    found = one([1.0, 2.0, 3.0, 4.0], [101.0, 102.1, 103.0, 104.0])
    assert found.p_holm < 0.001
    assert not found.distinguishable


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(KeyError):
        differences({"a": [1.0]}, "lora")
    with pytest.raises(ValueError, match="shorter"):
        differences({"lora": [1.0, 2.0], "other": [1.0]}, "lora")
    assert differences({"lora": [1.0, 2.0]}, "lora") == {}


@pytest.mark.parametrize("noise", list(NOISES))
def test_the_same_method_under_six_names_is_not_told_apart(noise: str) -> None:
    draw, told = np.random.default_rng(1), 0
    for _ in range(100):
        scores = NOISES[noise](draw, (6, 10))
        found = differences({str(place): list(row) for place, row in enumerate(scores)}, "0")
        told += any(one is not None and one.distinguishable for one in found.values())
    assert told <= 5


@pytest.mark.parametrize("noise", list(NOISES))
def test_a_planted_large_effect_is_found(noise: str) -> None:
    draw, found = np.random.default_rng(2), 0
    for _ in range(100):
        scores = NOISES[noise](draw, (6, 10))
        scores[1] += 3 * (scores[0] - scores[2]).std(ddof=1)
        other = differences({str(place): list(row) for place, row in enumerate(scores)}, "0")["1"]
        found += other is not None and other.distinguishable and other.mean > 0
    assert found >= 95


@pytest.mark.parametrize("noise", list(NOISES))
def test_the_interval_covers_the_truth(noise: str) -> None:
    draw, covered, runs = np.random.default_rng(3), 0, 300
    for _ in range(runs):
        base, other = NOISES[noise](draw, (2, 10))
        found = one(list(base), list(other + 0.25))
        covered += found.low <= 0.25 <= found.high
    # 95 % of 300, and three standard errors.
    assert 0.95 - 0.038 <= covered / runs <= 0.95 + 0.038
