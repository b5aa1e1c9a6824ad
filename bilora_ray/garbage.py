"""When Python looks for rings of garbage. What imports make stays, and a start would look through it for a second."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# New objects between two looks; Python's own is 700 or 2,000.
SELDOM = 50_000


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look seldom in the block, as will do for a command."""
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def importing() -> Iterator[None]:
    """Do not look while the block imports, nor ever again at what there is then, if it was the first to import it."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        gc.enable()
