"""Random orders that are pure functions of their key, on every machine and Python version."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import NDArray


def shuffled(count: int, *key: int | str) -> array[int]:
    """The numbers 0 .. count - 1 in an order that `key` decides, in 8 bytes each.

    Of the methods of `Random` only `random()` is promised to keep its values for a seed, so the order is a sort by it.
    """
    import numpy

    random = Random("/".join(str(part) for part in key))
    drawn = array("d", (random.random() for _ in range(count)))
    return _as_array(numpy.argsort(drawn, kind="stable"))


def stratified(groups: Sequence[int], *key: int | str) -> array[int]:
    """The numbers of the rows in an order, decided by `key`, of which every beginning has each group's share.

    Of a group of n rows the i-th one comes at (i + 1/2) / n of the way, so that a beginning has as many of them as its
    share of all rows says, rounded. Of one group alone it is `shuffled`.

    Args:
        groups: the number of what each row is counted as, by the row's number.
        key: as for `shuffled`.
    """
    import numpy

    whole = shuffled(len(groups), *key)
    if len(set(groups)) < 2:
        return whole
    order = numpy.asarray(whole)
    of_row = numpy.asarray(groups)[order]
    by_group = numpy.argsort(of_row, kind="stable")
    _, starts, sizes = numpy.unique(of_row[by_group], return_index=True, return_counts=True)
    rank = numpy.arange(len(order)) - numpy.repeat(starts, sizes)
    place = numpy.empty(len(order))
    place[by_group] = (2 * rank + 1) / (2 * numpy.repeat(sizes, sizes))
    return _as_array(order[numpy.argsort(place, kind="stable")])


def held_out(groups: Sequence[int], count: int, *key: int | str) -> array[int]:
    """The numbers of `count` rows with each group's share; the last row of a group is among them only if it must be.

    Args:
        groups: the number of what each row is counted as, by the row's number.
        count: of the rows that are held out.
        key: as for `shuffled`.
    """
    import numpy

    whole = stratified(groups, *key)
    if len(set(groups)) < 2:
        return whole[:count]
    order = numpy.asarray(whole)
    _, last = numpy.unique(numpy.asarray(groups)[order][::-1], return_index=True)
    is_last = numpy.zeros(len(order), dtype=bool)
    is_last[len(order) - 1 - last] = True
    return _as_array(numpy.concatenate([order[~is_last], order[is_last]])[:count])


def _as_array(numbers: NDArray) -> array[int]:
    return array("q", numbers.astype("int64").tobytes())
