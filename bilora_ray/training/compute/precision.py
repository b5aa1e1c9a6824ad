"""In which precision a trial computes, where its settings leave that to the machine."""

from __future__ import annotations

import torch

from bilora_ray.config import TrialConfig
from bilora_ray.training.compute import varlen
from bilora_ray.training.distributed.workers import ALONE, Workers

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def of_machine() -> str:
    """The `precision` of `auto`: bf16 where each GPU that this process sees computes in it by itself, else fp32."""
    if not torch.cuda.is_available():
        return "fp32"
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "fp32"
    return "bf16"


def resolved(config: TrialConfig, workers: Workers = ALONE, begun: str | None = None) -> TrialConfig:
    """`config` with a `precision` that is no longer `auto`.

    Args:
        config: the settings.
        workers: who train together: bf16 it is where all of them can.
        begun: the precision of the trial's checkpoint: it goes on as it began, on whatever machine.
    """
    if config.precision != "auto":
        return config
    found = {begun} if begun is not None else set(workers.gather(of_machine()))
    return config.model_copy(update={"precision": "bf16" if found == {"bf16"} else "fp32"})


def missing(kernel: str, precision: str) -> str | None:
    """As `varlen.missing`, by a word for the `precision` of trials on this machine."""
    return varlen.missing(kernel, DTYPE[of_machine() if precision == "auto" else precision])


def dtype_of(config: TrialConfig) -> torch.dtype:
    """Of the base weights and of what is computed with them."""
    return DTYPE[resolved(config).precision]


def use_tensor_cores() -> None:
    """Have float32 products on GPUs round their factors to TF32: many times faster, and sums stay in float32."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
