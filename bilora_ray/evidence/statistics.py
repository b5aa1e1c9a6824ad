"""Paired differences between methods: how large, how sure, and how many seeds would tell.

The scores of a seed share what the seed decides, so what is looked at is their difference, seed by seed. An interval is
the wider, at each end, of two: Student's, which holds where noise is symmetric, as the difference of two methods with
noise of one shape is; and a smoothed studentized bootstrap (Hall, The Bootstrap and Edgeworth Expansion, 1992, 3.3;
Silverman and Young, Biometrika 1987), which holds better where it is skewed, as it is where one method alone collapses
now and then. Percentile intervals of ten pairs cover 90 of 100. `benchmarks/comparison_calibration.py` measures all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL, POWER = 0.95, 0.8
# With fewer pairs nothing is called distinguishable: all would rest on the shape of noise that nobody has seen.
LEAST_PAIRS = 5
# More than these nobody runs.
MOST_SEEDS = 10_000
# Of the bootstrap: how often it draws, and the width of its kernel, in standard deviations of the differences.
DRAWS, KERNEL = 10_000, 0.5
# Differences that differ by a smaller share of the scores differ by rounding.
ROUNDING = 1e-9
METHOD = (
    f"paired by seed; {LEVEL:.0%} intervals, each by itself, the wider at each end of Student's and of a smoothed "
    f"studentized bootstrap of {DRAWS:,} draws; two-sided p of the same, corrected by Holm over all that is compared"
)


@dataclass(frozen=True)
class Difference:
    """How the scores of an entry differ from the baseline's, seed by seed. The unit is the metric's.

    Attributes:
        mean: of other - baseline.
        low: of the 95 % interval of the mean, for this entry alone: not corrected for how many are compared.
        high: the same.
        p: two-sided, of no difference. It is below 0.05 where the interval leaves 0 out.
        p_holm: the same, corrected for all entries that are compared (Holm, Scandinavian Journal of Statistics 1979).
        pairs: seeds with a score of both.
        seeds_needed: pairs that tell a difference of this size with 80 % power, at the level that each of all that are
            compared surely has under Holm's correction, 0.05 by their number. None: more than 10,000. It takes the
            difference that was seen for the true one; where that is luck, so is this.
        distinguishable: whether `p_holm` is below 0.05, of five pairs or more.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    pairs: int
    seeds_needed: int | None
    distinguishable: bool


def differences(
    scores: Mapping[str, Sequence[float | None]], baseline: str, *, seed: int = 0
) -> dict[str, Difference | None]:
    """How each entry but the `baseline` differs from it.

    Args:
        scores: entry -> its scores, each list in the same order of seeds. What is None or not finite drops its pair.
        baseline: one of the entries.
        seed: of the bootstrap's draws.

    Returns:
        None of an entry with fewer than two pairs.

    Raises:
        KeyError: the baseline is none of the entries.
        ValueError: the lists are not of one length.
    """
    paired = {name: _pairs(scores[baseline], told) for name, told in scores.items() if name != baseline}
    compared = {name: pairs for name, pairs in paired.items() if len(pairs) > 1}
    told = {name: _Told(pairs, seed) for name, pairs in compared.items()}
    corrected = holm({name: one.p for name, one in told.items()})
    found: dict[str, Difference | None] = dict.fromkeys(paired)
    for name, one in told.items():
        needed = one.seeds_needed((1 - LEVEL) / len(told))
        sure = corrected[name] < 1 - LEVEL and one.pairs >= LEAST_PAIRS
        found[name] = Difference(one.mean, one.low, one.high, one.p, corrected[name], one.pairs, needed, sure)
    return found


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction: the smallest of m values m times, the next m - 1 times, none smaller than one before it."""
    corrected: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(p, key=lambda one: p[one])):
        least = max(least, min(1.0, (len(p) - place) * p[name]))
        corrected[name] = least
    return corrected


def seeds_needed(effect: float, level: float) -> int | None:
    """Pairs with which a two-sided paired t test finds an `effect` with 80 % power, by the noncentral t distribution.

    Args:
        effect: the mean difference by the standard deviation of differences.
        level: of the test, such as 0.05.

    Returns:
        At least `LEAST_PAIRS`; None: more than `MOST_SEEDS`.
    """
    few, many = LEAST_PAIRS, MOST_SEEDS
    if power(effect, many, level) < POWER:
        return None
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if power(effect, middle, level) >= POWER else (middle + 1, many)
    return few


def power(effect: float, pairs: int, level: float) -> float:
    """How likely a two-sided paired t test finds an `effect`: Cohen, Statistical Power Analysis, 1988, 2.3.

    Args:
        effect: see `seeds_needed`.
        pairs: two or more.
        level: of the test.
    """
    from scipy.special import nctdtr, stdtrit

    freedom, shift = pairs - 1, abs(effect) * math.sqrt(pairs)
    bound = float(stdtrit(freedom, 1 - level / 2))
    missed = float(nctdtr(freedom, shift, bound))
    # Farther out what is found with the wrong sign is less than 1e-6, and scipy says nan of it and of what is missed.
    wrong = float(nctdtr(freedom, shift, -bound)) if shift < 3 else 0.0
    return 1.0 if math.isnan(missed) else 1 - missed + wrong


def _pairs(baseline: Sequence[float | None], other: Sequence[float | None]) -> Array:
    """Scores of both, of the seeds that have both: (pairs, 2)."""
    both = [(one, two) for one, two in zip(baseline, other, strict=True) if _is_score(one) and _is_score(two)]
    return np.array(both, dtype=np.float64).reshape(-1, 2)


def _is_score(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


class _Told:
    """What the pairs of one entry tell.

    Args:
        pairs: scores of the baseline and the other, (pairs, 2), two or more.
        seed: of the bootstrap's draws.
    """

    def __init__(self, pairs: Array, seed: int) -> None:
        found = pairs[:, 1] - pairs[:, 0]
        tolerance = ROUNDING * float(np.abs(pairs).max())
        self.pairs, self.mean, self.deviation = len(found), float(found.mean()), float(found.std(ddof=1))
        if np.ptp(found) <= tolerance:
            self.deviation, self.mean = 0.0, 0.0 if abs(self.mean) <= tolerance else self.mean
            self.p = 2.0 ** (1 - self.pairs) if self.mean else 1.0
            self.low, self.high = self._alike(_step(pairs, tolerance))
        else:
            self.p, self.low, self.high = self._studentized(found, seed)

    def seeds_needed(self, level: float) -> int | None:
        """See the function of this name; of differences that are all alike, with the sign test."""
        if self.deviation:
            return seeds_needed(self.mean / self.deviation, level)
        return max(LEAST_PAIRS, math.floor(1 - math.log2(level)) + 1) if self.mean else None

    def _alike(self, step: float) -> tuple[float, float]:
        """The interval of differences that are all alike.

        Of scores in steps, as an accuracy on few rows has them, the next difference may be one step off: with n that
        are not, it is so in a share of 1 - 0.025^(1/n) at the most, which is all that is known of the mean. Where the
        sign test cannot tell it from 0, that is in the interval.
        """
        width = step * (1 - ((1 - LEVEL) / 2) ** (1 / self.pairs))
        low, high = self.mean - width, self.mean + width
        return (low, high) if self.p < 1 - LEVEL else (min(low, 0.0), max(high, 0.0))

    def _studentized(self, found: Array, seed: int) -> tuple[float, float, float]:
        """The p and the interval: of Student's and the bootstrap's the more careful, each time."""
        from scipy.special import stdtr, stdtrit

        error = self.deviation / math.sqrt(self.pairs)
        drawn, seen, quantile = _drawn(found, seed), self.mean / error, float(stdtrit(self.pairs - 1, (1 + LEVEL) / 2))
        beyond = min(int(np.count_nonzero(drawn >= seen)), int(np.count_nonzero(drawn <= seen)))
        p = max(2 * float(stdtr(self.pairs - 1, -abs(seen))), min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)))
        # The order statistics that go with that count: the interval leaves 0 out where p is below 0.05.
        place = math.ceil((1 - LEVEL) / 2 * (len(drawn) + 1)) - 2
        least, most = min(-quantile, float(drawn[place])), max(quantile, float(drawn[-1 - place]))
        return p, self.mean - most * error, self.mean - least * error


def _drawn(found: Array, seed: int) -> Array:
    """Studentized means of the smoothed bootstrap, in order: how t varies about a true mean, shape of noise and all.

    The kernel is normal, so that no draw is without spread; with a wide one this is Student's distribution. Each draw
    of the kernel is taken with both signs: the interval of what differs the other way round is this one, mirrored.

    Args:
        found: differences, (pairs,), not all alike.
        seed: of the draws.
    """
    pairs = len(found)
    indices, kernel = _draws(pairs, seed)
    noise = ((found - found.mean()) / found.std(ddof=1))[indices]
    sums, kernels = noise.sum(axis=1), kernel.sum(axis=1)
    squares, both = np.square(noise).sum(axis=1) + np.square(kernel).sum(axis=1), 2 * (noise * kernel).sum(axis=1)
    # Of noise + kernel and noise - kernel: what is drawn itself need not be kept.
    total, square = np.concatenate([sums + kernels, sums - kernels]), np.concatenate([squares + both, squares - both])
    deviation = np.sqrt((square - total**2 / pairs) / (pairs - 1))
    studentized: Array = np.sort(total / (deviation * math.sqrt(pairs)))
    return studentized


@lru_cache(maxsize=8)
def _draws(pairs: int, seed: int) -> tuple[NDArray[np.int64], Array]:
    """Which differences a draw is of, and what the kernel adds: both (draws / 2, pairs)."""
    draw, size = np.random.default_rng(seed), (DRAWS // 2, pairs)
    return draw.integers(0, pairs, size), KERNEL * draw.standard_normal(size)


def _step(pairs: Array, tolerance: float) -> float:
    """The smallest gap between two scores: what an accuracy changes by with one row. 0 if all are alike."""
    gaps = np.diff(np.sort(pairs, axis=None))
    apart = gaps[gaps > tolerance]
    return float(apart.min()) if len(apart) else 0.0
