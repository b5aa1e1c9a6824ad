"""The auxiliary rebuilt in each step from what the backward pass has left, in place of AdamW's ascent.

The backward pass leaves P = G A^T and Q = B^T G of both adapters, where G is the gradient at the perturbed weight: the
gradients of the factors without their scaling. Two rules make a perturbation E of it, whose norm over all layers is
exactly rho:

- `tangent`: T = P_B G + G P_A - P_B G P_A, truncated to rank r2. P_B projects on the columns of [B2, B1], P_A on the
  rows of [A2; A1]. T is the projection of G on the tangent space of the weights that such factors can make.
- `half-step`: half a step of subspace iteration, G P_A and P_B G in turn, with the spans of the auxiliary alone.

There is no state of an optimizer and no learning rate. All is read from Gram matrices of the size of the ranks, in
float64, and the new factors are sums of the rows that are there: nothing of the size of a weight is formed, and layers
of one shape are computed in one batch. Of factors in parts (FSDP) each process has its part of the long sides.
Roundings apart, the result does not depend on how an eigenvector's sign falls: who trains together stays together.
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
# Squared singular values of a perturbation below this share are rounding.
ROUNDING = 1e-12
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


@torch.no_grad()
def tangent_(layers: Sequence[Layer], rho: float) -> None:
    """Make s2 B2 A2 the gradients' projection on the tangent space, truncated, of norm rho over all layers, in place.

    A2 gets orthonormal rows. A row that has no share in the product, since G has not rank r2, stays what it was. Where
    a gradient is not finite, or all of them are 0, everything stays.

    Args:
        layers: with the gradients in `grad`; absent ones count as 0.
        rho: radius, > 0.
    """
    batches = _batches(layers)
    _write(batches, _tangents(batches), rho)


@torch.no_grad()
def half_step_(layers: Sequence[Layer], rho: float, of_A: bool) -> None:
    """Make s2 B2 A2 the gradients' projection on a span of the auxiliary, of norm rho over all layers, in place.

    The factor whose span it is gets an orthonormal basis of it, the other one moves. A direction that the span has lost
    stays in the other factor, so that it can come back. What is not finite, or 0, is treated as in `tangent_`.

    Args:
        layers: as `tangent_`'s, of which the auxiliary is read.
        rho: radius, > 0.
        of_A: G P_A; else P_B G.
    """
    batches = _batches([Layer(layer.auxiliary, None) for layer in layers])
    _write(batches, [_half_step(batch, of_A) for batch in batches], rho)


def _batches(layers: Sequence[Layer]) -> list[Batch]:
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


def _tangents(batches: Sequence[Batch]) -> list[Sums]:
    """What the tangent rule makes of each batch, the small matrices of all that are of the same ranks at once."""
    found: dict[int, Sums] = {}
    kinds: dict[tuple[tuple[int, ...], torch.device], list[int]] = defaultdict(list)
    for number, batch in enumerate(batches):
        kinds[batch.ranks, batch.wide.rows.device].append(number)
    for (ranks, _), numbers in kinds.items():
        wide, tall = (
            torch.cat([_finite(side.gram.sums) for side in sides])
            for sides in zip(*((batches[number].wide, batches[number].tall) for number in numbers), strict=True)
        )
        sizes = [len(batches[number].layers) for number in numbers]
        parts = zip(*(part.split(sizes) for part in _tangent(wide, tall, ranks)), strict=True)
        found.update(zip(numbers, (Sums(*part) for part in parts), strict=True))
    return [found[number] for number in range(len(batches))]


def _tangent(wide: Tensor, tall: Tensor, ranks: tuple[int, ...]) -> Sums:
    """The truncated projection T = P_B G + G P_A - P_B G P_A of each layer.

    With Ah = Wa^T A and Bh = B Wb orthonormal, Ph = P Wa = G Ah^T and Qh = Wb^T Q = Bh^T G,

        T = [Bh, Pp] [[C, Rq], [I, 0]] [Ah; Qt]     C = Bh^T Ph,   Pp = Ph - Bh C,   Rq Qt = Qp = Qh - Qh Ah^T Ah

    where the rows of Qt are orthonormal, and to those of Ah too. T's right singular vectors in the basis [Ah; Qt] are
    the eigenvectors of the core's K^T K, which needs products of the rows that are there, and no others.

    Args:
        wide: L x 2R x 2R, of A and Q.
        tall: L x 2R x 2R, of B^T and P^T.
        ranks: r2 first; R is their sum.
    """
    L, R, r2 = len(wide), sum(ranks), ranks[0]
    bases = _bases(torch.cat([wide[:, :R, :R], tall[:, :R, :R]]), ranks)
    Wa, Wb = bases[:L], bases[L:]
    C = Wb.mT @ tall[:, :R, R:] @ Wa
    own_C = Wb.mT @ wide[:, R:, :R] @ Wa  # C but for rounding of the gradients, which must not enter Qp
    squares, E = torch.linalg.eigh(Wb.mT @ wide[:, R:, R:] @ Wb - own_C @ own_C.mT)
    squares = squares.clamp(min=0.0)
    Rq = E * squares.sqrt().unsqueeze(1)
    corner = C.mT @ Rq
    core = torch.cat(
        [
            torch.cat([Wa.mT @ tall[:, R:, R:] @ Wa, corner], dim=2),
            torch.cat([corner.mT, torch.diag_embed(squares)], dim=2),
        ],
        dim=1,
    )
    values, V = torch.linalg.eigh(core)
    S2, V = values.flip(1)[:, :r2].unsqueeze(2), V.mT.flip(1)[:, :r2]
    V1, V2 = V[:, :, :R], V[:, :, R:]
    up = V2 @ Rq.mT
    there = ROUNDING * S2[:, :1] < S2
    # B2^T = (T V)^T, and A2 = V^T with Qt^T V2 = Qp^T U1 / S.
    U1 = torch.where(there, (V1 @ C.mT + up) / S2, 0.0)
    new_tall = torch.cat([up @ Wb.mT, V1 @ Wa.mT], dim=2)
    new_wide = torch.cat([(V1 - U1 @ own_C) @ Wa.mT, U1 @ Wb.mT], dim=2)
    stays = torch.eye(r2, 2 * R, dtype=wide.dtype, device=wide.device)
    sign = _signs(new_wide)
    return Sums(
        torch.where(there, sign * new_wide, stays),
        torch.where(there, sign * new_tall, 0.0),
        torch.where(there, S2, 0.0).sum((1, 2)),
    )


def _half_step(batch: Batch, of_A: bool) -> Sums:
    """Half a step of subspace iteration: W^T f of the factor f that keeps its span, W^T g of the other's gradient g.

    The size of each layer's product is B2's.
    """
    sides = (batch.wide, batch.tall) if of_A else (batch.tall, batch.wide)
    kept, other = (_finite(side.gram.sums) for side in sides)
    r2 = batch.ranks[0]
    W, lost = _spans(kept[:, :r2, :r2], batch.ranks)
    squares = (W * (other[:, r2:, r2:] @ W)).sum((1, 2)).clamp(min=0.0)
    size = squares.sqrt().view(-1, 1, 1)
    none = torch.zeros_like(W)
    sign = _signs(W.mT)
    basis = torch.cat([sign * W.mT, none], dim=2)
    moved = torch.cat([none, sign * W.mT], dim=2)
    stays = torch.cat([sign * lost.mT, none], dim=2)
    if of_A:
        # As long as what has moved, or how long gradients are would decide how soon a lost direction is forgotten.
        length = (lost * (other[:, :r2, :r2] @ lost)).sum((1, 2)).clamp(min=0.0).sqrt().view(-1, 1, 1)
        by = torch.where((size > 0) & (length > 0), size / length, 1.0)
        return Sums(basis, moved + by * stays, squares)
    here = torch.eye(r2, 2 * r2, dtype=W.dtype, device=W.device)
    return Sums(torch.where(size > 0, moved / size + stays, here), basis * size, squares)


def _bases(gram: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """W of `_spans`."""
    return _spans(gram, ranks)[0]


def _spans(gram: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
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


def _signs(rows: Tensor) -> Tensor:
    """Of the largest number of each row: L x r x 1. An eigenvector's own sign is anybody's choice."""
    largest = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def _finite(sums: Tensor) -> Tensor:
    """Gram matrices, 0 where one has what is no number: of that there are no eigenvectors."""
    return torch.where(_are_finite(sums).view(-1, 1, 1), sums, 0.0)


def _are_finite(sums: Tensor) -> Tensor:
    return sums.sum((1, 2)).isfinite()


def _write(batches: Sequence[Batch], sums: Sequence[Sums], rho: float) -> None:
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
