"""Where the tests of a GPU compute: on one, or on a CPU to see that they run, with BILORA_GPU_TESTS_ON=cpu."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# Read as CUDA starts: with it, and only then, cuBLAS adds up in one order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """The kind of device that tests put their own tensors on. What one test leaves there is gone for the next."""
    import torch

    kind = os.environ.get("BILORA_GPU_TESTS_ON", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    yield kind
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def cuda(device: str) -> None:
    """For tests that a CPU can't take even to see that they run."""
    if device != "cuda":
        pytest.skip("there is nothing of it on a CPU")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of fp32 in fp32, whatever a trial sets: TF32 has 10 bits."""
    import torch

    set_precision, before = torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
    set_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    yield
    set_precision(before)


@pytest.fixture
def in_one_order() -> Iterator[None]:
    """Sums in one order: the same numbers twice."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
