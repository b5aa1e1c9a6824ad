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
    return _norm(_alike(factors))


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
    alike = _alike(factors)
    norm = _norm(alike)
    shrink = (rho / norm).sqrt().clamp(max=1.0)  # c = 0 gives infinity, hence 1
    tensors: dict[torch.device, list[Tensor]] = defaultdict(list)
    for group in alike:
        tensors[group.A[0].device] += map(own_part, (*group.A, *group.B))
    for device, own in tensors.items():
        torch._foreach_mul_(own, shrink.to(device))
    return norm.clamp(max=rho)


@torch.no_grad()
def project_each_(factors: Sequence[Factors], rho: float) -> None:
    """Clip each layer's perturbation by itself to ||.||_F <= rho, in place: what Eq. 10 is compared with (Table 5).

    Args:
        factors: of every adapted layer; changed in place.
        rho: the radius of each layer, > 0.

    Raises:
        ValueError: rho is not positive, or `factors` is empty.
    """
    if not rho > 0:
        raise ValueError(f"rho must be > 0, got {rho}")
    for group in _alike(factors):
        gram_A, gram_B = _gram(group.A), _gram(group.B, tall=True)
        add_up([gram_A, gram_B])
        norms = (gram_A.sums * gram_B.sums).sum((1, 2)).clamp(min=0.0).sqrt() * group.scaling
        shrinks = list((rho / norms).sqrt().clamp(max=1.0).unbind())
        for parts in (group.A, group.B):
            torch._foreach_mul_(list(map(own_part, parts)), shrinks)


class _Alike(NamedTuple):
    """The factors of layers of one shape, dtype, device and scaling."""

    A: list[Tensor]
    B: list[Tensor]
    scaling: float


def _alike(factors: Sequence[Factors]) -> list[_Alike]:
    if not factors:
        raise ValueError("there are no low-rank factors to measure")
    groups: dict[tuple[object, ...], _Alike] = {}
    for A, B, scaling in factors:
        kind = A.shape, B.shape, A.dtype, A.device, scaling
        if (group := groups.get(kind)) is None:
            group = groups[kind] = _Alike([], [], scaling)
        group.A.append(A)
        group.B.append(B)
    return list(groups.values())


@torch.no_grad()
def _norm(alike: Sequence[_Alike]) -> Tensor:
    grams = [(_gram(group.A), _gram(group.B, tall=True)) for group in alike]
    add_up([gram for pair in grams for gram in pair])
    device = alike[0].A[0].device
    squares = [
        # A sum of squares, which rounding can push below zero.
        ((gram_A.sums * gram_B.sums).sum() * group.scaling**2).clamp(min=0.0).to(device)
        for (gram_A, gram_B), group in zip(grams, alike, strict=True)
    ]
    return torch.stack(squares).sum().sqrt()


class Gram(NamedTuple):
    """Gram matrices of the rows of L factors.

    Attributes:
        sums: L x r x r, complete or this process's part.
        group: the processes whose parts add up; None if `sums` is complete.
    """

    sums: Tensor
    group: ProcessGroup | None


def _gram(factors: Sequence[Tensor], tall: bool = False) -> Gram:
    """Inner products of the rows of each factor, or of the columns of each that is tall.

    A caller's autocast would round them: c could overshoot rho.
    """
    if isinstance(factors[0], DTensor):
        parts = [columns(factor.mT if tall else factor) for factor in factors]
        rows, group = torch.stack([part for part, _ in parts]), parts[0][1]
    else:
        rows, group = torch.stack(list(factors)), None
        rows = rows.mT.contiguous() if tall else rows
    # As TF32 would, which a GPU may have been told to use for products of float32: float64 knows no such thing.
    wide = rows.double() if rows.is_cuda else rows
    with torch.autocast(rows.device.type, enabled=False):
        return Gram((wide @ wide.mT).to(rows.dtype), group)


def columns(factor: Tensor) -> tuple[Tensor, ProcessGroup | None]:
    """The columns of an r x k factor that this process has, and the group whose columns are all k of them."""
    assert isinstance(factor, DTensor)
    sharded = [dim for dim, placement in enumerate(factor.placements) if not placement.is_replicate()]
    if len(sharded) == 1 and factor.placements[sharded[0]].is_shard(1):
        return factor.to_local(), factor.device_mesh.get_group(sharded[0])
    return factor.full_tensor(), None


def add_up(grams: Sequence[Gram]) -> None:
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


def own_part(factor: Tensor) -> Tensor:
    """What this process has of a factor that may be sharded."""
    return factor.to_local() if isinstance(factor, DTensor) else factor
