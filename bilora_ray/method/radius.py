"""The radius of the perturbation: its norm over all layers, and its projection into the rho ball (Eq. 10).

Pure functions of low-rank factors; nothing here knows PEFT. Everything is read from r x r Gram matrices, so the
m x n product B A is never formed: the cost is O((m + n) r^2) a layer, and a handful of kernels a step, since layers
of one shape are computed in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One layer's low-rank weight change, scaling * B @ A.

    Attributes:
        A: r x n.
        B: m x r.
        scaling: s = alpha / r.
    """

    A: Tensor
    B: Tensor
    scaling: float


def perturbation_norm(factors: Sequence[Factors]) -> Tensor:
    """c = sqrt(sum_j ||s_j B_j A_j||_F^2) over all layers j (Eq. 10), measured on the effective perturbation.

    Args:
        factors: of every adapted layer; shapes, ranks and devices may differ between them.

    Returns:
        c, a scalar tensor on the first layer's device. No host synchronisation.

    Raises:
        ValueError: `factors` is empty.
    """
    if not factors:
        raise ValueError("there are no low-rank factors to measure")
    alike: dict[tuple[object, ...], list[Factors]] = defaultdict(list)
    for layer in factors:
        alike[(layer.A.shape, layer.B.shape, layer.A.dtype, layer.A.device, layer.scaling)].append(layer)
    squares = [_squared_norm(group) for group in alike.values()]
    device = factors[0].A.device
    return torch.stack([square.to(device) for square in squares]).sum().sqrt()


@torch.no_grad()
def project_(factors: Sequence[Factors], rho: float) -> Tensor:
    """Clip the perturbation to ||.||_F <= rho over all layers at once, in place (Eq. 10).

    When c > rho every A and every B is multiplied by sqrt(rho / c), so each product B A keeps its direction and all
    layers keep their proportions. The decision is made on the device: no host synchronisation.

    Args:
        factors: of every adapted layer; changed in place.
        rho: the radius, > 0.

    Returns:
        min(c, rho), the norm after the projection, a scalar tensor on the first layer's device.

    Raises:
        ValueError: rho is not positive, or `factors` is empty.
    """
    if not rho > 0:
        raise ValueError(f"rho must be > 0, got {rho}")
    norm = perturbation_norm(factors)
    shrink = (rho / norm).sqrt().clamp(max=1.0)  # c = 0 gives infinity, hence 1
    tensors: dict[torch.device, list[Tensor]] = defaultdict(list)
    for layer in factors:
        tensors[layer.A.device] += [layer.A, layer.B]
    for device, group in tensors.items():
        torch._foreach_mul_(group, shrink.to(device))
    return norm.clamp(max=rho)


def _squared_norm(layers: Sequence[Factors]) -> Tensor:
    """sum_j ||s B_j A_j||_F^2 over L layers of one shape: ||B A||_F^2 = sum((B^T B) * (A A^T))."""
    A = torch.stack([layer.A.detach() for layer in layers])
    B = torch.stack([layer.B.detach() for layer in layers])
    # A caller's autocast would round the Gram matrices to bf16 and let c overshoot rho.
    with torch.autocast(A.device.type, enabled=False):
        square = (_gram(B.mT) * _gram(A)).sum() * layers[0].scaling ** 2
    return square.clamp(min=0.0)  # a sum of squares that rounding can push below zero


def _gram(rows: Tensor) -> Tensor:
    """Inner products of the rows: L x r x k -> L x r x r. Factors sharded over k would be reduced here."""
    return rows @ rows.mT
