"""Random orders that are pure functions of their key, on every machine and Python version."""

from __future__ import annotations

from random import Random


def shuffled(count: int, *key: int | str) -> list[int]:
    """The numbers 0 .. count - 1 in an order that `key` decides.

    Of the methods of `Random` only `random()` is promised to keep its values for a seed, so the order is a sort by it.
    """
    random = Random("/".join(str(part) for part in key))
    return sorted(range(count), key=[random.random() for _ in range(count)].__getitem__)
