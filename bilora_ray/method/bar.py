"""Balancedness-aware regularization, nBAR and oBAR (Li, Zhang and He, NeurIPS 2024, arXiv 2410.14802).

Of a product B A, whose factors may trade their scale, sharpness-aware minimization makes the norms of both alike. BAR
does that by itself, at no cost to speak of: one factor of each layer grows a little, the other shrinks, as in decoupled
weight decay, with a coefficient that falls to 0 over the training. Which of them grows is told by the norms of the
gradients (nBAR: the one with the greater gradient, as in the paper's analysis of a matrix product) or of the factors
themselves (oBAR: the smaller one).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from bilora_ray.method.adapters import fuse
from bilora_ray.method.base import Descent, Place, adapter_places
from bilora_ray.method.lora import LoraAdamW
from bilora_ray.method.radius import own_part

# A1 and B1 of all layers, with their gradients -> d of each.
Grows = Callable[[list[Tensor], list[Tensor]], Tensor]


class BarAdamW(LoraAdamW):
    """LoRA with BAR: before each update A1 <- (1 + d a lr) A1, B1 <- (1 - d a lr) B1 in each layer, d = +-1 or 0.

    a is `bar_alpha` at the first step and falls linearly to 0 at the last, if the training tells how many steps it has.

    Args:
        model: a PEFT LoRA model without an auxiliary.
        grows: `with_greater_gradient` (nBAR) or `smaller` (oBAR).
        bar_alpha: coefficient, > 0.
        descent: as `LoraAdamW`'s.

    Raises:
        ValueError: as `LoraAdamW`, or bar_alpha is not positive.
    """

    def __init__(self, model: PeftModel, grows: Grows, *, bar_alpha: float = 0.25, **descent: Unpack[Descent]) -> None:
        if not bar_alpha > 0:
            raise ValueError(f"bar_alpha must be > 0, got {bar_alpha}")
        super().__init__(model, **descent)
        self._grows = grows
        group = self.param_groups[0]
        group.update(bar_alpha=bar_alpha, begun=0, factors=adapter_places(model, group["params"]))

    def _before_update(self) -> None:
        group = self.param_groups[0]
        factors = [group["params"][place] for place in group["factors"]]
        rate = group["bar_alpha"] * group["lr"] * self.remaining(group["begun"])
        group["begun"] += 1
        change = rate * self._grows(factors[0::2], factors[1::2])
        for parts, by in ((factors[0::2], 1 + change), (factors[1::2], 1 - change)):
            torch._foreach_mul_(list(map(own_part, parts)), list(by.unbind()))


def with_greater_gradient(A: list[Tensor], B: list[Tensor]) -> Tensor:
    """nBAR: of each layer 1 where A1 has the greater gradient and so is to grow, -1 where B1 has, else 0."""
    return (_norms(_gradients(A)) - _norms(_gradients(B))).sign()


def smaller(A: list[Tensor], B: list[Tensor]) -> Tensor:
    """oBAR: of each layer 1 where A1 is the smaller one and so is to grow, -1 where B1 is, else 0."""
    return (_norms(B) - _norms(A)).sign()


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Of each; 0 where there is none."""
    return [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]


def _norms(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])


def build(grows: Grows, model: PeftModel, place: Place, *, bar_alpha: float, **descent: Unpack[Descent]) -> BarAdamW:
    """BAR on the primary adapter. ValueError if there is nothing to train."""
    fuse(model)
    place(model)
    return BarAdamW(model, grows, bar_alpha=bar_alpha, **descent)


build_nbar = partial(build, with_greater_gradient)
build_obar = partial(build, smaller)
