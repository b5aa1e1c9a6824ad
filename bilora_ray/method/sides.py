"""The long sides of factors, of which a rule of the `ascent` reads Gram matrices and writes sums of rows.

Nothing of the size of a weight is formed, and layers of one shape are computed in one batch. Of factors in parts (FSDP)
each process has its part of the long sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor

from bilora_ray.method.radius import Factors, Gram, add_up, columns

# Squared singular values below this share of the greatest belong to no span: the rows depend on each other.
DEPENDENT = 1e-5
# Numbers of the long sides that are in float64 at once.
MOST = 2**24


class Layer(NamedTuple):
    """The adapters of one layer, each with what its gradients are divided by.

    Attributes:
        auxiliary: A2, B2, and the scaling with which rho is measured.
        primary: A1, B1, s1 times that scaling over s2; None where its gradients are not of the auxiliary's G.
    """

    auxiliary: Factors
    primary: Factors | None

    @property
    def adapters(self) -> list[Factors]:
        """The auxiliary first."""
        return [self.auxiliary] if self.primary is None else [self.auxiliary, self.primary]


class Side(NamedTuple):
    """One long side of layers of one kind: n of A and Q, or m of B and P.

    Attributes:
        rows: L x 2R x (n or m), float64: the factors' and then the gradients', what this process has of each.
        gram: L x 2R x 2R, of the rows.
    """

    rows: Tensor
    gram: Gram


class Batch(NamedTuple):
    """Layers of one kind.

    Attributes:
        layers: L of them.
        ranks: r2, and r1 where the primary takes part; R is their sum.
        wide: A and Q.
        tall: B^T and P^T.
    """

    layers: list[Layer]
    ranks: tuple[int, ...]
    wide: Side
    tall: Side


class Sums(NamedTuple):
    """What the new factors are sums of.

    Attributes:
        wide: L x r2 x 2R, of the rows of `Batch.wide`: A2.
        tall: L x r2 x 2R, of the rows of `Batch.tall`: B2^T, less the factor that makes the norm rho.
        squares: L, the squared norm of their product.
    """

    wide: Tensor
    tall: Tensor
    squares: Tensor


def batches_of(layers: Sequence[Layer]) -> list[Batch]:
    """The layers in batches of one kind, none too large, their Gram matrices complete."""
    kinds: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        kinds[_kind(layer)].append(layer)
    batches = [_batch(part) for alike in kinds.values() for part in _cut(alike)]
    add_up([side.gram for batch in batches for side in (batch.wide, batch.tall)])
    return batches


def _kind(layer: Layer) -> tuple[object, ...]:
    return tuple((A.shape, B.shape, A.dtype, A.device, scaling) for A, B, scaling in layer.adapters)


def _cut(layers: list[Layer]) -> Iterator[list[Layer]]:
    numbers = 2 * sum(adapter.A.numel() + adapter.B.numel() for adapter in layers[0].adapters)
    size = max(1, MOST // numbers)
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _batch(layers: list[Layer]) -> Batch:
    adapters = list(zip(*(layer.adapters for layer in layers), strict=True))
    wide = _side([([each.A for each in one], one[0].scaling) for one in adapters], tall=False)
    tall = _side([([each.B for each in one], one[0].scaling) for one in adapters], tall=True)
    return Batch(layers, tuple(one[0].A.shape[0] for one in adapters), wide, tall)


def _side(factors: Sequence[tuple[list[Tensor], float]], tall: bool) -> Side:
    """Of each adapter's factors, and the scaling that their gradients are divided by."""
    parts, group = [], None
    for tensors, _ in factors:
        rows, group = _rows(tensors, tall)
        parts.append(rows)
    for tensors, scaling in factors:
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in tensors]
        parts.append(_rows(gradients, tall)[0] / scaling)
    rows = torch.cat(parts, dim=1)
    return Side(rows, Gram(_product(rows, rows.mT), group))


def _rows(tensors: Sequence[Tensor], tall: bool) -> tuple[Tensor, ProcessGroup | None]:
    """L x r x k in float64, of columns that are tall or of rows that are wide; and those who have the rest of k."""
    group = None
    if isinstance(tensors[0], DTensor):
        found = [columns(tensor.mT if tall else tensor) for tensor in tensors]
        rows, group = torch.stack([part for part, _ in found]), found[0][1]
    else:
        rows = torch.stack([tensor.mT if tall else tensor for tensor in tensors])
    return rows.double(), group


def _product(one: Tensor, other: Tensor) -> Tensor:
    # A caller's autocast would round it.
    with torch.autocast(one.device.type, enabled=False):
        return one @ other


def spans(gram: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """W with W^T X X^T W = I on the span of X's rows and 0 in the columns of no span, from L x R x R Gram matrices.

    Each adapter's rows are first scaled together to norm 1: the adapters differ in size, and only spans matter.

    Returns:
        W, and the coefficients of what is in no span in the columns where W is 0; both L x R x R.
    """
    norms = [block.sum(1).sqrt() for block in gram.diagonal(dim1=1, dim2=2).split(ranks, dim=1)]
    scale = torch.stack([torch.where(norm > 0, 1 / norm, 0.0) for norm in norms], dim=1)
    scale = scale.repeat_interleave(torch.tensor(ranks, device=gram.device), dim=1, output_size=sum(ranks))
    values, E = torch.linalg.eigh(gram * scale.unsqueeze(1) * scale.unsqueeze(2))
    there = (values > DEPENDENT * values[:, -1:]).unsqueeze(1)
    W = torch.where(there, scale.unsqueeze(2) * E * values.clamp(min=0.0).rsqrt().unsqueeze(1), 0.0)
    return W, torch.where(there, 0.0, E)


def signs(rows: Tensor) -> Tensor:
    """Of the largest number of each row: L x r x 1. An eigenvector's own sign is anybody's choice."""
    largest = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def finite(sums: Tensor) -> Tensor:
    """Gram matrices, 0 where one has what is no number: of that there are no eigenvectors."""
    return torch.where(_are_finite(sums).view(-1, 1, 1), sums, 0.0)


def _are_finite(sums: Tensor) -> Tensor:
    return sums.sum((1, 2)).isfinite()


def write(batches: Sequence[Batch], sums: Sequence[Sums], rho: float) -> None:
    """Give A2 and B2 what is found, B2 with the factor by which the norm over all layers is rho.

    The decision whether there is anything is made on the device: no host synchronisation.
    """
    device = batches[0].wide.rows.device
    total = torch.stack([one.squares.sum().to(device) for one in sums]).sum().sqrt()
    finite = [_are_finite(side.gram.sums).all().to(device) for batch in batches for side in (batch.wide, batch.tall)]
    usable = torch.stack(finite).all() & (total > 0)
    for batch, found in zip(batches, sums, strict=True):
        here, scaling = usable.to(found.wide.device), batch.layers[0].auxiliary.scaling
        scale = (rho / (total * scaling)).to(found.wide.device)
        wide, tall = _product(found.wide, batch.wide.rows), _product(found.tall * scale, batch.tall.rows)
        for layer, A, B in zip(batch.layers, wide.unbind(), tall.unbind(), strict=True):
            _put(layer.auxiliary.A, A, here, batch.wide.gram.group)
            _put(layer.auxiliary.B, B.mT, here, batch.tall.gram.group)


def _put(factor: Tensor, new: Tensor, usable: Tensor, group: ProcessGroup | None) -> None:
    """`new` in place of `factor`, if it is `usable`: this process's part of it if there is a `group`, else all."""
    if not isinstance(factor, DTensor):
        own = factor
    else:
        own = factor.to_local()
        if group is None:
            new = distribute_tensor(new, factor.device_mesh, factor.placements, src_data_rank=None).to_local()
    own.copy_(torch.where(usable, new.to(own.dtype), own))
