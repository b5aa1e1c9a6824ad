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
from collections.abc import Sequence

import torch
from torch import Tensor

from bilora_ray.method.sides import Batch, Layer, Sums, batches_of, finite, signs, spans, write

# Squared singular values of a perturbation below this share are rounding.
ROUNDING = 1e-12


@torch.no_grad()
def tangent_(layers: Sequence[Layer], rho: float) -> None:
    """Make s2 B2 A2 the gradients' projection on the tangent space, truncated, of norm rho over all layers, in place.

    A2 gets orthonormal rows. A row that has no share in the product, since G has not rank r2, stays what it was. Where
    a gradient is not finite, or all of them are 0, everything stays.

    Args:
        layers: with the gradients in `grad`; absent ones count as 0.
        rho: radius, > 0.
    """
    batches = batches_of(layers)
    write(batches, _tangents(batches), rho)


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
    batches = batches_of([Layer(layer.auxiliary, None) for layer in layers])
    write(batches, [_half_step(batch, of_A) for batch in batches], rho)


def _tangents(batches: Sequence[Batch]) -> list[Sums]:
    """What the tangent rule makes of each batch, the small matrices of all that are of the same ranks at once."""
    found: dict[int, Sums] = {}
    kinds: dict[tuple[tuple[int, ...], torch.device], list[int]] = defaultdict(list)
    for number, batch in enumerate(batches):
        kinds[batch.ranks, batch.wide.rows.device].append(number)
    for (ranks, _), numbers in kinds.items():
        wide, tall = (
            torch.cat([finite(side.gram.sums) for side in sides])
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
    sign = signs(new_wide)
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
    kept, other = (finite(side.gram.sums) for side in sides)
    r2 = batch.ranks[0]
    W, lost = spans(kept[:, :r2, :r2], batch.ranks)
    squares = (W * (other[:, r2:, r2:] @ W)).sum((1, 2)).clamp(min=0.0)
    size = squares.sqrt().view(-1, 1, 1)
    none = torch.zeros_like(W)
    sign = signs(W.mT)
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
    """W of `spans`."""
    return spans(gram, ranks)[0]
