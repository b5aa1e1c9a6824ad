"""What a device can do, and what a computation asks of it: a speed as a share of the possible."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Rows of square matrices that keep a device busy, by its kind.
SQUARE = {"cuda": 8192}
SMALL_SQUARE = 1024
# Products that are timed; the fastest counts.
PRODUCTS = 6


def wait(device: torch.device) -> None:
    """Until `device` has done all that it was given. A CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product of random numbers, measured; of fp32 as it is set.

    It takes a tenth of a second or two.
    """
    size = SQUARE.get(device.type, SMALL_SQUARE)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def operations(compute: Callable[[], Any]) -> int:
    """Floating-point operations of the products, convolutions and attention that `compute` runs.

    What kernels of other libraries do is not seen: those of quantised weights are missing.
    """
    with FlopCounterMode(display=False) as counter:
        compute()
    return int(counter.get_total_flops())
