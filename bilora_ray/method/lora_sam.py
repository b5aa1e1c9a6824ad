"""LoRA-SAM: sharpness-aware minimization of the adapter's own parameters (Foret et al., ICLR 2021), in two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

import torch
from peft import PeftModel
from torch import Tensor

from bilora_ray.method.adapters import fuse
from bilora_ray.method.base import Closure, Descent, Place, adapter_places, evaluated
from bilora_ray.method.flat import with_gradients
from bilora_ray.method.lora import LoraAdamW
from bilora_ray.method.radius import own_part

# What keeps the gradient of a loss that is flat from being divided by nothing.
TINY = 1e-12


class LoraSamAdamW(LoraAdamW):
    """LoRA-SAM: each step takes the gradient at A1 + e_A, B1 + e_B, e = rho g / ||g|| (arXiv 2508.19564, Eq. 4).

    It costs two forward and two backward passes a step. The norm is that of the gradient of all factors together;
    what is trained beside them, such as a head, is not perturbed.

    Args:
        model: a PEFT LoRA model without an auxiliary.
        rho: radius of the perturbation of A1 and B1, > 0: in the space of the factors, not of the weight.
        descent: as `LoraAdamW`'s.

    Raises:
        ValueError: as `LoraAdamW`, or rho is not positive.
    """

    passes_per_step = 2.0

    def __init__(self, model: PeftModel, *, rho: float, **descent: Unpack[Descent]) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be > 0, got {rho}")
        super().__init__(model, **descent)
        group = self.param_groups[0]
        group.update(rho=rho, factors=adapter_places(model, group["params"]))

    def _gradients(self, closure: Closure | None) -> Tensor | None:
        """TypeError without a closure: the loss is asked for at two places."""
        if closure is None:
            raise TypeError("sharpness-aware minimization asks for the loss twice a step: step(closure)")
        loss = evaluated(closure)
        with self._uphill():
            evaluated(closure)
        return loss

    def next_perturbed(self) -> tuple[float, list[bool]]:
        """The radius of the next perturbation, and which of the factors it is of: each layer's A1, then its B1."""
        group = self.param_groups[0]
        return group["rho"], [True] * len(group["factors"])

    @contextmanager
    def _uphill(self) -> Iterator[None]:
        """In it the factors are rho up their gradient; after it they are what they were, to the bit."""
        group = self.param_groups[0]
        moved, gradients = with_gradients(group["params"][place] for place in group["factors"])
        before = [own_part(parameter.detach()).clone() for parameter in moved]
        scale = group["rho"] / (torch.nn.utils.get_total_norm(gradients) + TINY)
        torch._foreach_add_(moved, torch._foreach_mul(gradients, scale))
        try:
            yield
        finally:
            torch._foreach_copy_(list(map(own_part, moved)), before)  # torch copies no parts of many at once


def build(model: PeftModel, place: Place, *, rho: float, **descent: Unpack[Descent]) -> LoraSamAdamW:
    """LoRA-SAM on the primary adapter. ValueError if there is nothing to train."""
    fuse(model)
    place(model)
    return LoraSamAdamW(model, rho=rho, **descent)
