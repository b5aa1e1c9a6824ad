"""The blocks of a model, compiled each by itself.

A whole model is not: transformers would make a mask of every pair of positions then, and attention would lose its fast
kernel. What is measured is computed by the blocks as they are, so that an adapter measures the same everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn

from bilora_ray.errors import first_line

BACKEND = "inductor"
# So many graphs may come of one function, which is of all blocks: each rank of a search has one, and some more.
MOST_GRAPHS = 128


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that `model` is a list of, or several lists, as an encoder's and a decoder's."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


class Compiled:
    """Has the blocks of a model compiled, where this machine can, for as long as the trial lasts.

    Args:
        model: with all adapters.
        device: where it computes.
        wanted: whether to compile at all.
    """

    def __init__(self, model: nn.Module, device: torch.device, wanted: bool) -> None:
        self.wanted = wanted
        self._is_on = wanted and why_not(device.type) is None
        self._failed_before = _failed() if self._is_on else 0
        if self._is_on:
            for block in blocks_of(model):
                block.compile(dynamic=True, backend=BACKEND)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """In the block, what computes for the first time is compiled."""
        with _set_up() if self._is_on else nullcontext():
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """In the block, what computes is the model as it is: its texts would have a graph each, as they grow."""
        with torch.compiler.set_stance("force_eager") if self._is_on else nullcontext():
            yield

    def metrics(self) -> dict[str, float]:
        """`compiled`: 1 where all blocks that have computed are, else 0; nothing where that was not wanted."""
        is_whole = self._is_on and _failed() == self._failed_before
        return {"compiled": float(is_whole)} if self.wanted else {}


def why_not(device_type: str) -> str | None:
    """Why this machine cannot compile for a device of that type, such as a missing compiler; None if it can."""
    try:
        _try(device_type)
    except Exception as error:  # of torch, of a compiler, of a driver: whatever is missing says so in its own way
        return first_line(_first_cause(error))
    return None


@cache  # but what it raises is not kept, which may pass
def _try(device_type: str) -> None:
    with torch._dynamo.config.patch(suppress_errors=False):
        torch.compile(_twice, backend=BACKEND)(torch.ones(4, device=device_type))


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _first_cause(error: BaseException) -> BaseException:
    """What torch has wrapped, in its own way or in Python's."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return error if inner is None else _first_cause(inner)


@contextmanager
def _set_up() -> Iterator[None]:
    """What torch is told about compiling, in the block."""
    told = {
        "recompile_limit": MOST_GRAPHS,
        "accumulated_recompile_limit": 8 * MOST_GRAPHS,
        # A block that cannot be compiled computes as it is, which the trial's metrics say.
        "suppress_errors": True,
        # It would cut blocks into parts that share their gradients at one time each. They are small enough.
        "optimize_ddp": False,
    }
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # Rows that happen to be as many as a head is wide are no reason for another graph.
    shapes: Any = torch.fx.experimental._config
    try:
        with torch._dynamo.config.patch(told), shapes.patch(use_duck_shape=False):
            yield
    finally:
        logger.setLevel(level)


def _failed() -> int:
    frames = torch._dynamo.utils.counters["frames"]
    return frames["total"] - frames["ok"]
