"""Plain LoRA: AdamW over all that the model trains."""

from __future__ import annotations

from typing import Unpack

from peft import PeftModel
from torch import nn

from bilora_ray.method.adapters import fuse, has_auxiliary
from bilora_ray.method.base import Descent, MethodAdamW, Place, descent_group


class LoraAdamW(MethodAdamW):
    """Plain LoRA: AdamW over all that the model trains.

    Args:
        model: a PEFT LoRA model without an auxiliary.
        learning_rate: lr.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: limit on the gradient's norm, applied inside `step`; None for no limit.

    Raises:
        ValueError: the model has an auxiliary, or nothing to train, or max_grad_norm is not positive.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, max_grad_norm: float | None = None
    ) -> None:
        if has_auxiliary(model):
            raise ValueError("LoraAdamW would leave the auxiliary adapter as it is; use BiLoraAdamW, or detach it")
        super().__init__([descent_group(model, learning_rate, weight_decay, max_grad_norm)])


def build(model: PeftModel, place: Place, **descent: Unpack[Descent]) -> LoraAdamW:
    """Plain LoRA on the primary adapter. ValueError if there is nothing to train."""
    fuse(model)
    place(model)
    return LoraAdamW(model, **descent)
