"""Whether what a comparison says of methods is true, where the truth is planted.

Runs are simulated: pairs with noise of several shapes. Told is how often the 95 % interval of `evidence.statistics`
holds the true difference, beside three that it could have been; how often one of six names of the same method is called
distinguishable; and how often a planted effect is found, five entries being compared.

    OMP_NUM_THREADS=1 python benchmarks/comparison_calibration.py [--runs 2000] [--comparisons 500] [--jobs 2]
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product

import numpy as np
from numpy.random import Generator
from scipy.special import stdtrit

from bilora_ray.evidence.statistics import Array, Difference, differences

SEEDS = (3, 5, 10, 20)
ENTRIES = 6
EFFECTS = (1.0, 2.0, 3.0)
# Draws of the bootstraps that are shown beside.
DRAWS = 500
# (draw, how many entries, how many seeds) -> scores of the entries, which have one true score.
Noise = Callable[[Generator, int, int], Array]


def correlated(draw: Generator, entries: int, seeds: int) -> Array:
    """Nine tenths of the variance are the seed's, which all entries share."""
    return math.sqrt(0.9) * draw.standard_normal(seeds) + math.sqrt(0.1) * draw.standard_normal((entries, seeds))


def rows_of_200(deviation: float) -> Noise:
    """Accuracies near 0.9 on 200 rows, rounded to whole rows."""
    return lambda draw, entries, seeds: np.round(180 + 200 * deviation * draw.standard_normal((entries, seeds))) / 200


def collapsing(draw: Generator, size: tuple[int, ...]) -> Array:
    """One run in ten loses eight standard deviations."""
    return draw.standard_normal(size) - 8 * (draw.random(size) < 0.1) + 0.8


def only_others(noise: Callable[[Generator, tuple[int, ...]], Array]) -> Noise:
    """The baseline's noise is normal, the others' is not."""
    return lambda draw, entries, seeds: np.vstack([draw.standard_normal((1, seeds)), noise(draw, (entries - 1, seeds))])


# What is the same of all entries, as of one method under several names.
SHARED: dict[str, Noise] = {
    "normal": lambda draw, entries, seeds: draw.standard_normal((entries, seeds)),
    "normal, pairs correlated 0.9": correlated,
    "heavy tails (Student's t of 3)": lambda draw, entries, seeds: draw.standard_t(3, (entries, seeds)),
    "skewed (lognormal)": lambda draw, entries, seeds: draw.lognormal(0, 1, (entries, seeds)),
    "one run in ten collapses": lambda draw, entries, seeds: collapsing(draw, (entries, seeds)),
    "accuracy on 200 rows, sd 0.01": rows_of_200(0.01),
    "accuracy on 200 rows, sd 0.0025": rows_of_200(0.0025),
    "accuracy on 200 rows drawn anew": lambda draw, entries, seeds: draw.binomial(200, 0.9, (entries, seeds)) / 200,
}
# What is not: of these only coverage is asked.
UNLIKE: dict[str, Noise] = {
    "skewed (gamma of 2), the other alone": only_others(lambda draw, size: draw.gamma(2, 1, size) - 2),
    "exponential, the other alone": lambda draw, entries, seeds: np.vstack(
        [np.zeros((1, seeds)), draw.exponential(1, (entries - 1, seeds)) - 1]
    ),
    "one run in ten collapses, the other alone": only_others(collapsing),
}
NOISES = SHARED | UNLIKE


def compared(scores: Array) -> list[Difference]:
    """Every entry against the first one."""
    found = differences({str(place): row.tolist() for place, row in enumerate(scores)}, "0")
    return [one for one in found.values() if one is not None]


def beside(found: Array, draw: Generator) -> list[tuple[float, float]]:
    """The intervals that it could have been: Student's, the percentile and the studentized bootstrap's."""
    pairs, mean, deviation = len(found), found.mean(), found.std(ddof=1)
    drawn, error = found[draw.integers(0, pairs, (DRAWS, pairs))], deviation / math.sqrt(pairs)
    width = stdtrit(pairs - 1, 0.975) * error
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = np.nan_to_num((drawn.mean(axis=1) - mean) / errors, nan=0.0, posinf=1e9, neginf=-1e9)
    least, most = np.quantile(studentized, (0.025, 0.975), method="nearest") if deviation else (0.0, 0.0)
    ends = [(mean - most * error, mean - least * error) if deviation else (mean, mean)]
    return [(mean - width, mean + width), (low, high), *ends]


def coverage(job: tuple[str, int], runs: int) -> list[float]:
    """In how many of 100 intervals the truth is: ours, then those beside; and how wide ours is to Student's."""
    (noise, seeds), held, widths = job, np.zeros(4), []
    draw = generator(noise, seeds, 1)
    for _ in range(runs):
        scores = NOISES[noise](draw, 2, seeds)
        (ours,) = compared(scores)
        others = beside(scores[1] - scores[0], draw)
        # Of means of whole rows, rounding is no miss.
        held += [low - 1e-9 <= 0 <= high + 1e-9 for low, high in [(ours.low, ours.high), *others]]
        student = others[0][1] - others[0][0]
        widths += [(ours.high - ours.low) / student] if student > 1e-12 else []
    return [*(100 * held / runs), float(np.median(widths))]


def told(job: tuple[str, int], comparisons: int) -> list[float]:
    """Of 100 comparisons: where one of six names is told from the first; then where each planted effect is found.

    An effect is in standard deviations of the paired difference, known from many pairs.
    """
    noise, seeds = job
    draw = generator(noise, seeds, 2)
    many = SHARED[noise](draw, 2, 100_000)
    deviation, counts = (many[1] - many[0]).std(), np.zeros(1 + len(EFFECTS))
    for _ in range(comparisons):
        scores = SHARED[noise](draw, ENTRIES, seeds)
        counts[0] += any(one.distinguishable for one in compared(scores))
        for place, effect in enumerate(EFFECTS):
            planted = scores.copy()
            planted[1] += effect * deviation
            first = compared(planted)[0]
            counts[1 + place] += first.distinguishable and first.mean > 0
    return list(100 * counts / comparisons)


def generator(noise: str, seeds: int, purpose: int) -> Generator:
    """Of the draws of one cell of a table."""
    return np.random.default_rng([zlib.crc32(noise.encode()), seeds, purpose])


def error(share: float, runs: int) -> str:
    """A share of 100 with the two standard errors that it has from so many runs."""
    return f"{share:.1f} ± {200 * math.sqrt(max(share * (100 - share), 1) / 1e4 / runs):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--comparisons", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    wide, shared = list(product(NOISES, SEEDS)), list(product(SHARED, SEEDS))
    with ProcessPoolExecutor(given.jobs) as pool:
        print(f"The interval holds the truth in so many of 100, of {given.runs} comparisons of two methods:\n")
        print("| noise | seeds | reported | Student's | percentile bootstrap | bootstrap-t | width / Student's |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for (noise, seeds), cells in zip(wide, pool.map(partial(coverage, runs=given.runs), wide), strict=True):
            others = " | ".join(f"{cell:.1f}" for cell in cells[1:4])
            print(f"| {noise} | {seeds} | {error(cells[0], given.runs)} | {others} | {cells[4]:.2f} |", flush=True)
        print(f"\nOf 100 comparisons of {ENTRIES} entries, of {given.comparisons}:\n")
        found = " | ".join(f"{effect:g} sd is found" for effect in EFFECTS)
        print(f"| noise | seeds | one of six names of the same is told apart | {found} |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for (noise, seeds), cells in zip(
            shared, pool.map(partial(told, comparisons=given.comparisons), shared), strict=True
        ):
            others = " | ".join(f"{cell:.1f}" for cell in cells[1:])
            print(f"| {noise} | {seeds} | {error(cells[0], given.comparisons)} | {others} |", flush=True)


if __name__ == "__main__":
    main()
