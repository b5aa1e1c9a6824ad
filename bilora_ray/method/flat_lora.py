"""Flat-LoRA: plain LoRA under random noise on the full weight, which grows over the training (Li et al., ICML 2025)."""

from __future__ import annotations

import math
from typing import Unpack

from peft import PeftModel
from torch import Tensor

from bilora_ray.method.adapters import accept_noise
from bilora_ray.method.base import Closure, Descent, Place, evaluated
from bilora_ray.method.lora import LoraAdamW
from bilora_ray.method.noise import FactorNoise, WeightNoise


class FlatLoraAdamW(LoraAdamW):
    """Flat-LoRA (arXiv 2409.14396): each step's gradient is that at W0 + s1 B1 A1 + noise, other noise in each step.

    The noise of a weight's row i is N(0, (c rho ||row i|| / sqrt(n))^2) in each of its n numbers, with the norm of
    the merged weight's row, and c = (1 - cos(pi t / T)) / 2 in step t of T, from 0 on: as in the authors' code. The
    gradient does not go through the norms. The loss that `step` returns is under the noise.

    Args:
        model: a PEFT LoRA model whose layers `accept_noise`.
        noise: where the noise is.
        rho: size of the noise, > 0: by about so much of its norm a row moves at the end.
        descent: as `LoraAdamW`'s.

    Raises:
        ValueError: as `LoraAdamW`, or rho is not positive.
    """

    def __init__(
        self, model: PeftModel, noise: WeightNoise | FactorNoise, *, rho: float, **descent: Unpack[Descent]
    ) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be > 0, got {rho}")
        super().__init__(model, **descent)
        self._noise = noise
        self.param_groups[0].update(rho=rho, begun=0)

    def _gradients(self, closure: Closure | None) -> Tensor | None:
        """TypeError without a closure: outside of it there is no noise."""
        if closure is None:
            raise TypeError("the noise is there while the step asks for the loss: step(closure)")
        group = self.param_groups[0]
        with self._noise.at(group["begun"], group["rho"] * self._share(group["begun"])):
            loss = evaluated(closure)
        group["begun"] += 1
        return loss

    def _share(self, begun: int) -> float:
        """Of the noise, how much there is once `begun` steps are done. RuntimeError if nobody said of how many."""
        if self.total_steps is None:
            raise RuntimeError("Flat-LoRA's noise grows over the training: set total_steps to its number of steps")
        return (1 - math.cos(math.pi * (1 - self.remaining(begun)))) / 2


def build(model: PeftModel, place: Place, *, rho: float, seed: int, **descent: Unpack[Descent]) -> FlatLoraAdamW:
    """Flat-LoRA on the primary adapter. ValueError if there are other than plain linear layers, or cut weights."""
    layers = accept_noise(model)
    place(model)
    return FlatLoraAdamW(model, WeightNoise(layers, seed), rho=rho, **descent)
