"""How rows are cut into forward passes: rows of like length together, and no pass with more positions than it may have.

A pass is padded to its longest row, so that rows of one length waste nothing. But a pass also costs something whatever
is in it: the cut that is taken costs least of all, in positions. It follows from the lengths, the limits and the kind
of device, and from no clock, so that a trial that goes on cuts as it did.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Literal

# What a pass is for.
Kind = Literal["training", "evaluation", "generation"]
# How many tokens of a row each part of a model reads: one number, or an encoder's and a decoder's.
Sides = tuple[int, ...]
# So many positions take as long as what a pass costs beside them. CPU: measured on one thread, 95 for the quickstart's
# model and 25 to 28 for hidden sizes of 256 and 512. GPU: 700 for an 8B and 1,700 for a 1B beside a fast host; measured
# beside a slow one, some 3,000 for an 8B.
OVERHEAD = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True)
class Budget:
    """What a pass may hold. One row is always allowed.

    Attributes:
        rows: so many rows, each as long as the longest of all; 1: each row is a pass of its own.
        positions: so many positions instead, padding too, whatever `rows` is.
        proven: no more positions than these in any case, for more ran out of memory.
        padded: whether the rows of a pass are padded to the longest; else they are one after another.
    """

    rows: int
    positions: int | None = None
    proven: int | None = None
    padded: bool = True

    def limits(self, sides: Sequence[Sides]) -> tuple[list[int], int]:
        """How many positions a pass over some of these rows may have, by side and of all sides."""
        of_side = [sys.maxsize if self.positions else self.rows * max(side) for side in zip(*sides, strict=True)]
        return of_side, min(self.positions or sys.maxsize, self.proven or sys.maxsize)


@dataclass
class Proven:
    """The largest passes that had room, where larger ones ran out of memory; None: all had room.

    Attributes:
        training: positions of a pass.
        evaluation: the same.
        generation: texts that are written at once.
    """

    training: int | None = None
    evaluation: int | None = None
    generation: int | None = None

    @classmethod
    def told_by(cls, metrics: Mapping[str, float]) -> Proven:
        """What the `metrics` of an evaluation say of it."""
        return cls(**{kind: int(metrics[f"{kind}_limit"]) for kind in vars(cls()) if f"{kind}_limit" in metrics})

    @classmethod
    def least(cls, of_all: Iterable[Proven]) -> Proven:
        """The smallest that any of them knows."""
        known = [vars(proven) for proven in (cls(), *of_all)]
        return cls(**{kind: min((one[kind] for one in known if one[kind]), default=None) for kind in known[0]})

    def metrics(self) -> dict[str, int]:
        """As metrics of an evaluation: what is not known is not among them."""
        return {f"{kind}_limit": size for kind, size in vars(self).items() if size is not None}

    def in_words(self) -> Iterator[str]:
        """What there is to say, for people to read."""
        for kind, size in (("training", self.training), ("evaluation", self.evaluation)):
            if size is not None:
                yield f"{kind} passes of at most {size} positions: larger ones ran out of memory"
        if self.generation is not None:
            yield f"generation of at most {self.generation} texts at once: more ran out of memory"


def cut(sides: Sequence[Sides], budget: Budget, device: str, workers: int = 1) -> list[list[int]]:
    """Indices of rows by pass, the longest rows first; if there is one pass, in the order that they have.

    Args:
        sides: of each row.
        budget: what a pass may hold.
        device: torch's name of its kind.
        workers: who share the passes. All get equally many if there are rows enough, and as even ones as can be.
    """
    if budget.rows == 1 and budget.positions is None:
        return [[row] for row in range(len(sides))]
    order = sorted(range(len(sides)), key=lambda row: -sum(sides[row]))
    lengths, (of_side, of_all) = [sides[row] for row in order], budget.limits(sides)
    if budget.padded:
        starts = _cheapest(lengths, of_side, of_all, OVERHEAD.get(device, OVERHEAD["cuda"]))
    else:  # no cut has more positions than another one
        starts = _filled(lengths, of_side, of_all, padded=False)
    if workers > 1:
        count = min(-(-len(starts) // workers) * workers, len(sides))
        starts = _even(lengths, of_side, of_all, count, budget.padded)
    elif len(starts) == 1:
        return [list(range(len(sides)))]
    return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]


def positions(sides: Sequence[Sides], padded: bool = True) -> int:
    """How many positions a pass over rows of these `sides` has, padding too if they are `padded`."""
    return len(sides) * sum(map(max, zip(*sides, strict=True))) if padded else sum(map(sum, sides))


def _cheapest(lengths: Sequence[Sides], of_side: list[int], of_all: int, overhead: int) -> list[int]:
    """Where each pass begins, of the cut whose positions and overheads add up to the least.

    Of equally good ones it has fuller passes first.
    """
    import numpy

    rows = numpy.array(lengths)
    costs, begins, begin = numpy.zeros(len(rows) + 1), [0], 0
    for end in range(1, len(rows) + 1):
        # A last pass from each row on, back from `end`, but not from before what the pass before could reach.
        longest = numpy.maximum.accumulate(rows[begin:end][::-1])
        counts = numpy.arange(1, end - begin + 1)
        held = counts[:, None] * longest
        allowed = (held <= of_side).all(1) & (held.sum(1) <= of_all) | (counts == 1)
        counts, held = counts[allowed], held[allowed]
        found = costs[end - counts] + held.sum(1)
        best = int(found.argmin())
        costs[end] = found[best] + overhead
        begins.append(end - int(counts[best]))
        begin = end - int(counts[-1])
    starts, end = [], len(rows)
    while end:
        end = begins[end]
        starts.append(end)
    return starts[::-1]


def _even(lengths: Sequence[Sides], of_side: list[int], of_all: int, count: int, padded: bool) -> list[int]:
    """Where each pass begins if there are `count`, or fewer, and the largest of them is as small as can be."""
    low, high = 0, min(of_all, positions(lengths))
    while high - low > 1:
        middle = (low + high) // 2
        if len(_filled(lengths, of_side, middle, padded)) > count:
            low = middle
        else:
            high = middle
    return _filled(lengths, of_side, high, padded)


def _filled(lengths: Sequence[Sides], of_side: list[int], of_all: int, padded: bool) -> list[int]:
    """Where each pass begins if each takes as many rows as these limits let it."""
    starts = [0]
    longest = (0,) * len(of_side)  # or the sum of all, where they are not padded to the longest
    for row, sides in enumerate(lengths):
        count, wider = row - starts[-1] + 1, tuple(map(max if padded else add, longest, sides))
        held = [count * side if padded else side for side in wider]
        if count > 1 and (sum(held) > of_all or any(map(int.__gt__, held, of_side))):
            starts.append(row)
            wider = sides
        longest = wider
    return starts
