"""Which searched settings mattered: a functional analysis of variance of all trials after as many rows.

The effect of a number is a parabola, that of a choice a level for each value. A forest (Hutter et al., ICML 2014,
https://proceedings.mlr.press/v32/hutter14.html) asks less of their shape and far more of the number of trials; it also
takes seconds, where hundreds of shuffled and resampled studies are needed to say what noise alone would show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from optuna.trial import FrozenTrial

from bilora_ray.search.space import Choice, Distribution, Value

# From so many on, a learning rate that explains nine tenths of the variance is found in more than 90 of 100 studies, be
# it one of three settings or of five; a choice among five asks for 20. See benchmarks/results/importances.md.
LEAST_TRIALS = 12
# Most have come so far if so many have. Of fewer, the weak are missing, and with them what made them weak.
MOST = 0.8
# An evaluation counts for one after other rows by such a share of them.
NEAR = 0.05
SHUFFLES, RESAMPLES = 199, 200
# In such a share of studies noise alone names a setting.
FALSE_ALARMS = 0.05
# Share of the resampled studies that lie in a setting's interval.
INTERVAL = 0.8
# Robust standard deviations from the median at which values are clipped: one diverged trial must not hide the others.
FURTHEST = 3.0
# Of columns with numbers up to 1: what rounding leaves of those that others hold.
NEGLIGIBLE = 1e-6
SHARES = (
    "functional ANOVA (a parabola for a number, a level for each choice) less what chance explains; shown where "
    f"{1 - FALSE_ALARMS:.0%} of shuffled studies explain less"
)
INTERVALS = f"the middle {INTERVAL:.0%} of resampled ones"
METHOD = f"{SHARES}; in brackets {INTERVALS}"


@dataclass(frozen=True)
class Share:
    """What one setting explains of the values' variance, 0 to 1, and the ends of its interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Importances:
    """What mattered in a study.

    Attributes:
        rows: training rows before the evaluations that were compared; None if there are none that most trials have.
        num_trials: that have it.
        shares: setting -> its share, the largest first, as far as noise and doubt allow.
        unknown: why `shares` is empty, in words.
    """

    rows: int | None
    num_trials: int
    shares: Mapping[str, Share] = field(default_factory=dict)
    unknown: str | None = None


def importances_of(
    trials: Sequence[FrozenTrial],
    distributions: Mapping[str, Distribution],
    step_rows: Callable[[Mapping[str, Value]], int],
) -> Importances:
    """What mattered among `trials`, after the largest number of training rows at which `MOST` of them were evaluated.

    Steps of larger batches are more training, so that rows are what is compared, as at a rung. An evaluation that is a
    little off, since a batch does not divide all rows, is taken for one there; a trial without one is left out.

    Args:
        trials: that are complete or were stopped early.
        distributions: setting -> what it is drawn from.
        step_rows: of a trial's settings, the training rows of a step.
    """
    evaluated = []
    for trial in trials:
        finite = {step: value for step, value in trial.intermediate_values.items() if np.isfinite(value)}
        of_a_step = step_rows(trial.params) if finite else 0
        evaluated.append({step * of_a_step: value for step, value in finite.items()})
    for rows in sorted({rows for values in evaluated for rows in values}, reverse=True):
        there = [(trial.params, _near(rows, values)) for trial, values in zip(trials, evaluated, strict=True)]
        compared = [(params, value) for params, value in there if value is not None]
        if len(compared) >= MOST * len(trials):
            shares, unknown = shares_of([params for params, _ in compared], [v for _, v in compared], distributions)
            return Importances(rows, len(compared), shares, unknown)
    why = f"most of the {len(trials)} trials that ended were not evaluated after as many training rows"
    return Importances(None, 0, unknown=why if trials else "no trial has ended")


def _near(rows: int, values: Mapping[int, float]) -> float | None:
    """The value after about so many `rows`; None if there is none."""
    nearest = min(values, key=lambda other: abs(other - rows), default=0)
    return values[nearest] if values and abs(nearest - rows) <= NEAR * rows else None


def shares_of(
    settings: Sequence[Mapping[str, Value]], values: Sequence[float], distributions: Mapping[str, Distribution]
) -> tuple[dict[str, Share], str | None]:
    """What each setting explains of the variance of `values`; or nothing, and why.

    A setting that only some trials have, as `rho`, is judged by the differences among these. The same trials give the
    same result.

    Args:
        settings: of each trial.
        values: of each trial, finite.
        distributions: setting -> what it is drawn from.
    """
    if len(values) < LEAST_TRIALS:
        return {}, f"known from {LEAST_TRIALS} comparable trials on; there are {len(values)}"
    y = _clipped(np.array(values, dtype=float))
    if np.ptp(y) == 0:
        return {}, "all trials have the same value"
    random = np.random.default_rng(0)
    given = {key for trial in settings for key in trial}
    columns = {key: _columns(drawn, settings, key) for key, drawn in distributions.items() if key in given}
    found = _above_noise({key: _basis(functions) for key, functions in columns.items()}, y, random)
    if not found:
        return {}, f"nothing that can be told from noise with {len(values)} trials"
    shares = _with_intervals({key: columns[key] for key in found}, y, random)
    if not shares:
        return {}, f"the interval is wider than the share itself with {len(values)} trials"
    return shares, None


def _clipped(values: np.ndarray) -> np.ndarray:
    median = np.median(values)
    furthest = FURTHEST * 1.4826 * np.median(np.abs(values - median))
    # Most are equal where it is 0; clipped, all would be.
    return np.clip(values, median - furthest, median + furthest) if furthest else values


def _columns(drawn: Distribution, settings: Sequence[Mapping[str, Value]], key: str) -> np.ndarray:
    """The functions of one setting that its effect is a sum of, (trials, functions); NaN in trials without it."""
    if isinstance(drawn, Choice):
        levels = sorted({repr(trial[key]) for trial in settings if key in trial})
        rows = [[repr(trial[key]) == level if key in trial else np.nan for level in levels] for trial in settings]
        return np.array(rows, dtype=float)
    numbers = np.array([trial.get(key, np.nan) for trial in settings], dtype=float)
    ends = np.array(drawn.ends(), dtype=float)
    if drawn.log:
        numbers, ends = np.log(numbers), np.log(ends)
    scaled = 2 * (numbers - ends[0]) / (ends[1] - ends[0]) - 1
    return np.stack([scaled, scaled**2], axis=1)


def _basis(columns: np.ndarray) -> np.ndarray:
    """Orthonormal functions, (trials, degrees of freedom), with mean 0 among the trials that have the setting."""
    present = ~np.isnan(columns)
    filled = np.where(present, columns, 0.0)
    mean = filled.sum(axis=0) / np.maximum(1, present.sum(axis=0))
    return _orthonormal(np.where(present, filled - mean, 0.0))


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    left, strengths, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, strengths > NEGLIGIBLE]


def _without(columns: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return columns - basis @ (basis.T @ columns)


def _above_noise(bases: Mapping[str, np.ndarray], y: np.ndarray, random: np.random.Generator) -> list[str]:
    """The settings that explain more than they would of shuffled values, each of what those before it leave."""
    orders = np.stack([np.arange(len(y)), *(random.permutation(len(y)) for _ in range(SHUFFLES))])
    found: list[str] = []
    while (key := _next(bases, found, y, orders)) is not None:
        found.append(key)
    return found


def _next(bases: Mapping[str, np.ndarray], found: Sequence[str], y: np.ndarray, orders: np.ndarray) -> str | None:
    """The setting that explains most of what those `found` leave of `y`, if noise would not have one that does.

    Noise is what they leave, shuffled (Freedman and Lane, 1983), and the setting is compared with whichever explains
    most of that (Westfall and Young, 1993). The first of the `orders` is the trials' own.
    """
    known = _orthonormal(np.hstack([np.ones((len(y), 1)), *(bases[key] for key in found)]))
    left = _without(y, known)
    if left @ left <= NEGLIGIBLE * np.var(y):
        return None
    shuffled = _without(left[orders].T, known)
    shares = {}
    for key in [key for key in bases if key not in found]:
        basis = _orthonormal(_without(bases[key], known))
        # Functions for half of the trials at the most, or nothing is left to tell noise by.
        if 0 < basis.shape[1] <= len(y) / 2 - known.shape[1]:
            chance = basis.shape[1] / (len(y) - known.shape[1])
            explained = ((basis.T @ shuffled) ** 2).sum(axis=0) / (shuffled**2).sum(axis=0)
            shares[key] = (explained - chance) / (1 - chance)
    if not shares:
        return None
    best = max(shares, key=lambda key: shares[key][0])
    largest = np.max(list(shares.values()), axis=0)
    return best if np.mean(largest >= shares[best][0]) <= FALSE_ALARMS else None


def _with_intervals(columns: Mapping[str, np.ndarray], y: np.ndarray, random: np.random.Generator) -> dict[str, Share]:
    """The shares of the settings in `columns`, the largest first, up to one whose interval is wider than the share."""
    shares = _explained(list(columns.values()), y)
    studies = random.integers(len(y), size=(RESAMPLES, len(y)))
    resampled = [_explained([functions[rows] for functions in columns.values()], y[rows]) for rows in studies]
    low, high = np.quantile(resampled, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
    ends = zip(shares.tolist(), np.minimum(low, shares).tolist(), np.maximum(high, shares).tolist(), strict=True)
    found = {key: Share(*numbers) for key, numbers in zip(columns, ends, strict=True)}
    largest_first = sorted(found.items(), key=lambda item: -item[1].share)
    return dict(takewhile(lambda item: item[1].high - item[1].low <= item[1].share, largest_first))


def _explained(columns: Sequence[np.ndarray], y: np.ndarray) -> np.ndarray:
    """The share of the variance of `y` that each of `columns` explains beside the others, less what chance would."""
    bases = [_basis(functions) for functions in columns]
    freedom = np.array([basis.shape[1] for basis in bases])
    centred = y - y.mean()
    total = centred @ centred
    if total == 0:
        return np.zeros(len(bases))
    weights = np.split(np.linalg.lstsq(np.hstack(bases), centred, rcond=None)[0], np.cumsum(freedom)[:-1])
    explained = np.array([centred @ basis @ part for basis, part in zip(bases, weights, strict=True)]) / total
    chance = freedom / (len(y) - 1)
    return np.clip((explained - chance) / (1 - chance.sum()), 0, 1)
