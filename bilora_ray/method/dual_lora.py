"""Dual-LoRA: Bi-LoRA whose auxiliary descends too, the ablation of its ascent (arXiv 2508.19564, Table 5)."""

from __future__ import annotations

from typing import Unpack

from peft import PeftModel

from bilora_ray.method.adapters import attach_auxiliary
from bilora_ray.method.base import Descent, Place
from bilora_ray.method.bilora import BiLoraAdamW


class DualLoraAdamW(BiLoraAdamW):
    """Bi-LoRA with the sign of the auxiliary's move turned round: all else, its end among it, is Bi-LoRA's."""

    climbs = False


def build(
    model: PeftModel,
    place: Place,
    *,
    auxiliary_rank: int,
    rho: float,
    auxiliary_learning_rate: float | None,
    **descent: Unpack[Descent],
) -> DualLoraAdamW:
    """Dual-LoRA on the primary adapter and a new auxiliary. ValueError as Bi-LoRA's."""
    attach_auxiliary(model, auxiliary_rank)
    place(model)
    return DualLoraAdamW(model, rho=rho, auxiliary_learning_rate=auxiliary_learning_rate, **descent)
