"""Random orders that are pure functions of their key, on every machine and Python version."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from random import Random


def shuffled(count: int, *key: int | str) -> array[int]:
    """The numbers 0 .. count - 1 in an order that `key` decides, in 8 bytes each.

    Of the methods of `Random` only `random()` is promised to keep its values for a seed, so the order is a sort by it.
    """
    import numpy

    random = Random("/".join(str(part) for part in key))
    drawn = array("d", (random.random() for _ in range(count)))
    order = array("q")
    order.frombytes(numpy.argsort(drawn, kind="stable").astype(numpy.int64).tobytes())
    return order


def stratified(groups: Sequence[Hashable], *key: int | str) -> list[int]:
    """The numbers of the rows in an order, decided by `key`, of which every beginning has each group's share.

    Of a group of n rows the i-th one comes at (i + 1/2) / n of the way, so that a beginning has as many of them as its
    share of all rows says, rounded. Of one group alone it is `shuffled`.

    Args:
        groups: what each row is counted as, by its number.
        key: as for `shuffled`.
    """
    order = shuffled(len(groups), *key)
    sizes, before = Counter(groups), Counter[Hashable]()
    place = [0.0] * len(groups)
    for row in order:
        place[row] = (2 * before[groups[row]] + 1) / (2 * sizes[groups[row]])
        before[groups[row]] += 1
    return sorted(order, key=place.__getitem__)


def held_out(groups: Sequence[Hashable], count: int, *key: int | str) -> list[int]:
    """The numbers of `count` rows with each group's share; the last row of a group is among them only if it must be.

    Args:
        groups: what each row is counted as, by its number.
        count: of the rows that are held out.
        key: as for `shuffled`.
    """
    order = stratified(groups, *key)
    last = {groups[row]: row for row in order}
    return sorted(order, key=lambda row: last[groups[row]] == row)[:count]
