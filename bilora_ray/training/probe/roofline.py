"""What a device can do, and what a computation asks of it: a speed as a share of the possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Rows of square matrices that keep a device busy, by its kind.
SQUARE = {"cuda": 8192}
SMALL_SQUARE = 1024
# Products that are timed, and their seconds, at the least: a GPU that was idle takes its time to be fast.
PRODUCTS, SECONDS = 4, 0.2


@dataclass
class Marks:
    """Moments on a device, each with the name of what ended there: on a GPU events, for which nobody waits.

    What the host does while a GPU is busy takes no time so; what a GPU waits for does.

    Attributes:
        device: the device.
        found: name and moment, in order.
    """

    device: torch.device
    found: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, name: str) -> None:
        """Note that what is called `name` has ended."""
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.found.append((name, moment))

    def seconds(self) -> dict[str, float]:
        """Those of all that ended under a name, by name; of the first mark nothing is known. It waits, and forgets."""
        wait(self.device)
        total: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.found, self.found[1:], strict=False):
            lasted = before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
            total[name] = total.get(name, 0.0) + lasted
        self.found.clear()
        return total


def wait(device: torch.device) -> None:
    """Until `device` has done all that it was given. A CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest of some large products of random matrices.

    Those of fp32 are rounded as torch is told to. It takes some tenths of a second.
    """
    size = SQUARE.get(device.type, SMALL_SQUARE)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < PRODUCTS or sum(seconds) < SECONDS:
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def counting() -> FlopCounterMode:
    """What counts floating-point operations: what torch's own does, and what our models have besides."""
    kinds = ("efficient", "flash", "cudnn")
    of_torch = torch.ops.aten
    forward = {getattr(of_torch, f"_scaled_dot_product_{kind}_attention"): _attention for kind in kinds}
    back = {getattr(of_torch, f"_scaled_dot_product_{kind}_attention_backward"): _attention_back for kind in kinds}
    return FlopCounterMode(display=False, custom_mapping={**forward, **back, of_torch.addmm_: _product})


def _product(_: Any, left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
    """Of a product that is added in place, as a layer over a bf16 base adds the base's; torch counts others only."""
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    rows, heads, length, size = query  # keys may have fewer heads
    return 2 * rows * heads * length * key[-2] * (size + value[-1])


def _attention_back(
    _: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *__: Any, **___: Any
) -> int:
    """As torch counts it: the scores once more, and two products for each of the two that there were."""
    rows, heads, length, size = query
    return 2 * rows * heads * length * key[-2] * (3 * size + 2 * value[-1])


def operations(compute: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention that `compute` runs.

    What kernels of other libraries do is not seen: those of quantised weights are missing.
    """
    with counting() as counted:
        compute()
    return int(counted.get_total_flops())
