"""The radius of the perturbation: its norm over all layers, and its projection into the rho ball (Eq. 10).

Pure functions of low-rank factors; nothing here knows PEFT. Everything is read from r x r Gram matrices, so the
m x n product B A is never formed: the cost is O((m + n) r^2) a layer, and a handful of kernels a step, since layers
of one shape are computed in one batch. Factors may be sharded (FSDP's DTensors): where the shards cut the long sides,
n of A and m of B, each process adds its part to the Gram matrices and one small reduction gives all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor


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
    grams = [(_gram([layer.A for layer in group]), _gram([layer.B.mT for layer in group])) for group in alike.values()]
    _add_up([gram for pair in grams for gram in pair])
    device = factors[0].A.device
    squares = [
        # A sum of squares, which rounding can push below zero.
        ((gram_A.sums * gram_B.sums).sum() * group[0].scaling ** 2).clamp(min=0.0).to(device)
        for (gram_A, gram_B), group in zip(grams, alike.values(), strict=True)
    ]
    return torch.stack(squares).sum().sqrt()


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
        tensors[layer.A.device] += map(_own_part, (layer.A, layer.B))
    for device, group in tensors.items():
        torch._foreach_mul_(group, shrink.to(device))
    return norm.clamp(max=rho)


class _Gram(NamedTuple):
    """Gram matrices of the rows of L factors.

    Attributes:
        sums: L x r x r, complete or this process's part.
        group: the processes whose parts add up; None if `sums` is complete.
    """

    sums: Tensor
    group: ProcessGroup | None


def _gram(factors: Sequence[Tensor]) -> _Gram:
    """Inner products of the rows of each r x k factor. A caller's autocast would round them: c could overshoot rho."""
    parts = [_columns(factor.detach()) for factor in factors]
    rows = torch.stack([part for part, _ in parts])
    # As TF32 would, which a GPU may have been told to use for products of float32: float64 knows no such thing.
    wide = rows.double() if rows.is_cuda else rows
    with torch.autocast(rows.device.type, enabled=False):
        return _Gram((wide @ wide.mT).to(rows.dtype), parts[0][1])


def _columns(factor: Tensor) -> tuple[Tensor, ProcessGroup | None]:
    """The columns of an r x k factor that this process has, and the group whose columns are all k of them."""
    if not isinstance(factor, DTensor):
        return factor, None
    sharded = [dim for dim, placement in enumerate(factor.placements) if not placement.is_replicate()]
    if len(sharded) == 1 and factor.placements[sharded[0]].is_shard(1):
        return factor.to_local(), factor.device_mesh.get_group(sharded[0])
    return factor.full_tensor(), None


def _add_up(grams: Sequence[_Gram]) -> None:
    """Complete those that are in parts, in place: one reduction for each group of processes, as a rule one in all."""
    apart: dict[ProcessGroup, list[Tensor]] = defaultdict(list)
    for gram in grams:
        if gram.group is not None:
            apart[gram.group].append(gram.sums)
    for group, parts in apart.items():
        flat = torch.cat([part.flatten() for part in parts])
        all_reduce(flat, group=group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))


def _own_part(factor: Tensor) -> Tensor:
    return factor.to_local() if isinstance(factor, DTensor) else factor
