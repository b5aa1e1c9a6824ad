"""Which examples come together, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

from bilora_ray.training.data.order import shuffled

T = TypeVar("T")


def train_batch(num_rows: int, batch_size: int, seed: int, epoch: int, index: int) -> Sequence[int]:
    """Row indices of one batch of one epoch, in which each row is once; the last batch may be smaller.

    A pure function of its arguments, so that training resumes exactly by counting the batches it has done.
    """
    return _epoch(num_rows, seed, epoch)[index * batch_size : (index + 1) * batch_size]


@lru_cache(maxsize=1)
def _epoch(num_rows: int, seed: int, epoch: int) -> Sequence[int]:
    return shuffled(num_rows, "epoch", seed, epoch)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Row indices by length: too little memory shows at once."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def eval_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices of batches of like `lengths`, longest first: little padding."""
    order = longest_first(lengths)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_row_order(batches: Sequence[Sequence[int]], outputs: Iterable[T]) -> list[T]:
    """`outputs`, one for each row in the order of `batches`, put back into the order of the rows."""
    rows = [row for batch in batches for row in batch]
    return [output for _, output in sorted(zip(rows, outputs, strict=True), key=lambda pair: pair[0])]
