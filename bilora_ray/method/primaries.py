"""What a primary adapter is besides plain LoRA: the magnitudes of DoRA, and the start of PiSSA and of LoRA-GA.

PiSSA and LoRA-GA begin with factors B0 A0 that are not 0, and so as to begin as the base they take s B0 A0 off W0. Here
no weight is changed: a layer with a `start` computes with W0 + s (B1 A1 - B0 A0), which is the same weight, the same
gradients of A1 and B1, and the base to the bit at first. So the base may be shared, a bf16 one loses nothing, and what
leaves training is plain LoRA of rank 2r on the base as it is: see `layers.FusedLayer.change`. B0 and A0 are kept with
each checkpoint, for a decomposition may be random, and a gradient is of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bilora_ray.method.layers import LOW_PRECISION, PRIMARY, change_of, plain_class_of, with_start
from bilora_ray.method.radius import Factors

# gamma of LoRA-GA, its authors' default.
STABLE_GAMMA = 16
# Of a weight and a rank: A0, r x n, and B0, m x r.
Start = tuple[Tensor, Tensor]
# How many singular vectors a start takes for each rank.
DIRECTIONS = {"pissa": 1, "lora-ga": 2}


def with_exact_magnitudes(model: PeftModel) -> PeftModel:
    """`model`, with the magnitudes of a DoRA that has just been put on it, B = 0, as fp32 has them: no others.

    PEFT takes the norms of the weight's rows in the base's dtype, and divides by them in fp32. On a bf16 base each row
    would begin some tenths of a percent longer or shorter than it is.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and PRIMARY in module.lora_variant:
            weight = weight_in_rows(module)
            if weight.dtype in LOW_PRECISION:
                magnitude = module.lora_magnitude_vector[PRIMARY]
                magnitude.weight = nn.Parameter(torch.linalg.norm(weight.float(), dim=1))
    return model


def weight_in_rows(layer: LoraLayer) -> Tensor:
    """W0 of an adapted linear layer, m x n, a row for each output; of a quantised one as it is computed with."""
    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def await_start(model: PeftModel, directions: int) -> PeftModel:
    """Have the layers of a model with a new primary, B = 0, compute what becomes of it from a start on, now 0.

    Args:
        model: to be given a method, whose layers compute so, and then `begin` or a checkpoint.
        directions: how many singular vectors of a weight, or of its gradient, the start takes for each rank.

    Raises:
        ValueError: a layer is other than plain LoRA on an unquantised linear one, or too small; the message names it.
    """
    layers = {name: one for name, one in model.get_base_model().named_modules() if _is_primary(one)}
    others = [name for name, layer in layers.items() if not _takes_start(layer)]
    small = [name for name, one in layers.items() if not others and directions * one.r[PRIMARY] > _least_side(one)]
    if others or small:
        told = "is on unquantised linear layers, not on" if others else "takes more singular vectors than there are of"
        raise ValueError(f"a primary with a start {told} {', '.join((others or small)[:5])}")
    for layer in layers.values():
        A, B, scaling = change_of(layer)
        layer.start = Factors(torch.zeros_like(A.detach()), torch.zeros_like(B.detach()), scaling)
    return model


@torch.no_grad()
def begin(model: nn.Module, found: Iterable[Start]) -> None:
    """Give the primary of each layer with a start, in order, the factors that were `found` for it: see `keep_start`."""
    for layer, (A, B) in zip(with_start(model).values(), found, strict=True):
        own = _own(layer)
        own.A.copy_(A)
        own.B.copy_(B)


@torch.no_grad()
def keep_start(model: nn.Module) -> None:
    """Have the primary of each layer with a start begin where it is now, adding nothing to W0."""
    for layer in with_start(model).values():
        own, start = _own(layer), _start(layer)
        start.A.copy_(own.A)
        start.B.copy_(own.B)


def starts(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 of each layer with a start, by name: the tensors themselves."""
    return {
        f"{name}.{factor}": tensor
        for name, layer in with_start(model).items()
        for factor, tensor in zip(("A", "B"), _start(layer)[:2], strict=True)
    }


@torch.no_grad()
def principal_starts(model: nn.Module) -> Iterable[Start]:
    """PiSSA's (arXiv 2404.02948, Eq. 2-3), of each layer: the r greatest singular values of W0, their roots in each.

    Of W0 = U S V^T: A0 = sqrt(S_r / s) V_r^T and B0 = U_r sqrt(S_r / s).
    """
    for layer in with_start(model).values():
        weight, scaling, r = weight_in_rows(layer), layer.scaling[PRIMARY], layer.r[PRIMARY]
        U, S, Vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        root = (S[:r] / scaling).sqrt()
        yield root.unsqueeze(1) * Vh[:r], U[:, :r] * root


@torch.no_grad()
def gradient_starts(model: nn.Module, gradients: Sequence[Tensor]) -> Iterable[Start]:
    """LoRA-GA's (arXiv 2407.05000, its authors' `ArB2r` and `stable`), of each layer: singular vectors of dL/dW0.

    Of dL/dW0 = U S V^T: A0 = c V[:, :r]^T and B0 = c U[:, r:2r], c = m^(1/4) / sqrt(gamma). PEFT multiplies B0 by the
    singular values and leaves A0 as it is, which is not what the paper or its code has. torch's global generator
    decides the last digits.

    Args:
        model: with `await_start` done.
        gradients: m x n of each layer, in order, wherever they lie.
    """
    for layer, gradient in zip(with_start(model).values(), gradients, strict=True):
        r, own = layer.r[PRIMARY], _own(layer)
        U, _, V = torch.svd_lowrank(gradient.to(own.A.device), q=min(4 * r, *gradient.shape), niter=4)
        size = len(gradient) ** 0.25 / STABLE_GAMMA**0.5
        yield size * V[:, :r].T, size * U[:, r : 2 * r]


def _own(layer: LoraLayer) -> Factors:
    A, B = layer.lora_A[PRIMARY].weight, layer.lora_B[PRIMARY].weight
    return Factors(cast(Tensor, A), cast(Tensor, B), layer.scaling[PRIMARY])


def _start(layer: LoraLayer) -> Factors:
    return cast(Factors, getattr(layer, "start"))  # noqa: B009 # a plain layer has it from `await_start` only


def _is_primary(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and PRIMARY in module.r


def _takes_start(layer: nn.Module) -> bool:
    """Whether `layer` computes W0 x + s1 B1 A1 x and nothing else, with a W0 that is there as numbers."""
    assert isinstance(layer, LoraLayer)
    is_plain = plain_class_of(layer) is lora.Linear and type(layer.get_base_layer()) in (nn.Linear, Conv1D)
    return is_plain and PRIMARY not in layer.lora_variant and not layer.lora_bias[PRIMARY]


def _least_side(layer: nn.Module) -> int:
    assert isinstance(layer, LoraLayer)
    return min(weight_in_rows(layer).shape)
