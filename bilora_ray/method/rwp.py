"""Random weight perturbation: LoRA under random noise of one size (Li et al., arXiv 2211.11489, without its mixing)."""

from __future__ import annotations

from typing import Literal, Unpack

from peft import PeftModel

from bilora_ray.method.adapters import accept_noise, fuse, primary_factors
from bilora_ray.method.base import Descent, Place
from bilora_ray.method.flat_lora import FlatLoraAdamW
from bilora_ray.method.noise import FactorNoise, WeightNoise

Space = Literal["weight", "lora"]


class RwpAdamW(FlatLoraAdamW):
    """Each step's gradient is that under noise: on the full weight as Flat-LoRA's, or on A1 and B1 by the same rule.

    The size of the noise is rho from the first step on.
    """

    def _share(self, begun: int) -> float:
        return 1.0


def build(
    model: PeftModel, place: Place, *, rho: float, rwp_space: Space, seed: int, **descent: Unpack[Descent]
) -> RwpAdamW:
    """Random weight perturbation of the primary adapter. ValueError if there is nothing to train, or as Flat-LoRA's."""
    noise: WeightNoise | FactorNoise
    if rwp_space == "weight":
        layers = accept_noise(model)
        place(model)
        noise = WeightNoise(layers, seed)
    else:
        fuse(model)
        place(model)
        noise = FactorNoise([factor for layer in primary_factors(model) for factor in (layer.A, layer.B)], seed)
    return RwpAdamW(model, noise, rho=rho, **descent)
