"""Whether a perturbation of the adapted weights is adversarial: how much of the next batch's sharpness it captures.

Beside it is what the batch before tells of the next one, without a limit on its rank: the *stale* direction, that
batch's whole gradient at W. Who remembers several batches may have more. SAM, which knows the next batch, has 1.

Pure functions of a space, passes and factors. All is computed in evaluation mode, so without dropout, and no weight is
written: see `sharpness`. Gradients lie in host memory, two at a time, and are on the device one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilora_ray.method.layers import AUXILIARY, PRIMARY
from bilora_ray.method.lora_sam import TINY
from bilora_ray.method.radius import Factors, perturbation_norm
from bilora_ray.method.spaces import FullSpace, Pass, Vector, inner, norm

# Passes over a batch that `adversity` takes, all three together: gradients, and losses beside them.
GRADIENTS, LOSSES = 3, 8
# A rise that is a smaller share of the loss may be rounding: of fp32 and wider, and of narrower numbers.
ROUNDING, ROUNDING_IN_LOW_PRECISION = 1e-5, 1e-3
# Directions that are shorter than this share of a factor's longest, squared, are none.
NEGLIGIBLE = 1e-12


class Perturbation(NamedTuple):
    """What is added to the adapted weights while a loss is computed, layer by layer in the order of a space.

    Attributes:
        change: the effective change of each weight, scaling * B @ A.
        spans: the factors whose rows of A and columns of B are looked at beside the primary's.
        radius: what its norm may be; None: what it is.
    """

    change: Sequence[Factors]
    spans: Sequence[Factors]
    radius: float | None = None


class Batches(NamedTuple):
    """The passes of three batches: the one that the last update was of, the next one, and one that stays the same."""

    previous: Sequence[Pass]
    following: Sequence[Pass]
    held_out: Sequence[Pass]


# The gradient of the next batch at W -> what the next step perturbs with.
Perturb = Callable[[Vector], Perturbation]


def of_auxiliary(space: FullSpace, radius: float | None) -> Perturb:
    """Bi-LoRA's: s2 B2 A2 as it is now, whatever the next batch is.

    Args:
        space: of a model with an auxiliary.
        radius: rho, where that is of the norm over all layers.
    """
    factors = space.factors(AUXILIARY)
    return lambda _: Perturbation(factors, factors, radius)


def of_factors(space: FullSpace, rho: float, chosen: Sequence[bool]) -> Perturb:
    """LoRA-SAM's of the primary's factors, and what it is of the weight.

    s1 ((B + e_B)(A + e_A) - B A) = s1 (e_B (A + e_A) + B e_A), with e = rho g / ||g|| over all factors that are moved
    (arXiv 2508.19564, Eq. 4), and g = (s1 B^T G, s1 G A^T).

    Args:
        space: of plain LoRA.
        rho: radius in the space of the factors.
        chosen: which factors are moved, each layer's A and then its B.
    """
    primary = [Factors(A.detach(), B.detach(), scaling) for A, B, scaling in space.factors(PRIMARY)]

    def perturb(gradient: Vector) -> Perturbation:
        slopes = []
        for part, (A, B, scaling) in zip(gradient, primary, strict=True):
            on_device = part.to(A.device)
            slopes += [scaling * B.to(part.dtype).T @ on_device, scaling * on_device @ A.to(part.dtype).T]
        moved = [
            slope if is_chosen else torch.zeros_like(slope) for slope, is_chosen in zip(slopes, chosen, strict=True)
        ]
        scale = rho / (norm(moved) + TINY)
        changes, spans = [], []
        for (A, B, scaling), by_A, by_B in zip(primary, moved[0::2], moved[1::2], strict=True):
            by_A, by_B = by_A * scale, by_B * scale
            spans.append(Factors(by_A, by_B, scaling))
            changes.append(Factors(torch.cat([A + by_A, by_A]), torch.cat([by_B, B.to(by_B.dtype)], dim=1), scaling))
        return Perturbation(changes, spans)

    return perturb


@torch.no_grad()
def adversity(space: FullSpace, batches: Batches, perturb: Perturb) -> dict[str, float]:
    """What there is to say of a perturbation, at the weights as they are now.

    A captured share is (L(W + P) - L(W)) / (L(W + radius g / ||g||) - L(W)), L and its gradient g being the batch's.
    It is left out where the rise beneath may be rounding, as a cosine is of what is zero.

    Args:
        space: where the gradient is.
        batches: rows to measure on.
        perturb: what is asked about.

    Returns:
        `auxiliary_norm` = ||P||; `auxiliary_cosine` of P and the next batch's gradient; `captured_sharpness` on the
        next batch and `captured_sharpness_held_out`; the same of a perturbation of that radius along the gradient of
        the batch before: `stale_cosine`, `stale_captured_sharpness`, `stale_captured_sharpness_held_out`; and
        `subspace_overlap`.
    """
    stale, fresh = space.gradient(batches.previous), space.gradient(batches.following)
    asked = perturb(fresh)
    size = float(perturbation_norm(asked.change))
    radius = size if asked.radius is None else asked.radius
    known = {"auxiliary_norm": size, "subspace_overlap": subspace_overlap(asked.spans, space.factors(PRIMARY))}
    known["auxiliary_cosine"] = _ratio(_along(fresh, asked.change), size * norm(fresh))
    known["stale_cosine"] = _ratio(inner(stale, fresh), norm(stale) * norm(fresh))
    following = _captured(space, batches.following, fresh, asked.change, stale, radius)
    del fresh  # two of them are as much as there is to be in memory
    held_out = _captured(space, batches.held_out, space.gradient(batches.held_out), asked.change, stale, radius)
    for word, found in (("", following), ("_held_out", held_out)):
        known |= {f"captured_sharpness{word}": found[0], f"stale_captured_sharpness{word}": found[1]}
    return {name: value for name, value in known.items() if value is not None and math.isfinite(value)}


def subspace_overlap(ones: Sequence[Factors], others: Sequence[Factors]) -> float | None:
    """The mean squared cosine of the principal angles between what two adapters' factors span, over all layers.

    It is of the rows of A with the rows of A, and of the columns of B with the columns of B, as many angles as the
    smaller span has dimensions (arXiv 2106.09685, Eq. 4, of the whole of both): 1 where one span holds the other, 0
    where they are orthogonal, about the greater rank / n for spans of random rows. r x r Gram matrices say it all.

    Returns:
        None where a factor is zero in every layer.
    """
    found = []
    for one, other in zip(ones, others, strict=True):
        found += [_overlap(one.A, other.A), _overlap(one.B.mT, other.B.mT)]
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known else None


def _captured(
    space: FullSpace,
    passes: Sequence[Pass],
    gradient: Vector,
    change: Sequence[Factors],
    stale: Vector,
    radius: float,
) -> tuple[float | None, float | None]:
    """The shares that `change` and the stale direction have in the rise along the gradient of `passes`."""
    rest = space.loss(passes)
    rise = space.loss(passes, gradient, radius / (norm(gradient) + TINY)) - rest
    least = (ROUNDING_IN_LOW_PRECISION if space.low_precision else ROUNDING) * abs(rest)
    own = space.loss_beside(passes, change) - rest
    by_stale = space.loss(passes, stale, radius / (norm(stale) + TINY)) - rest
    return (own / rise, by_stale / rise) if rise > least else (None, None)


def _along(gradient: Vector, change: Sequence[Factors]) -> float:
    """<G, s B A> over all layers, each of which is s sum((B^T G) * A)."""
    return math.fsum(_slopes(gradient, change))


def _slopes(gradient: Vector, change: Sequence[Factors]) -> Iterator[float]:
    for part, (A, B, scaling) in zip(gradient, change, strict=True):
        onto = B.detach().to(part.dtype).T @ part.to(A.device)
        yield scaling * torch.sum(onto * A.detach(), dtype=torch.float64).item()


def _ratio(value: float, by: float) -> float | None:
    return value / by if by > TINY else None


def _overlap(one: Tensor, other: Tensor) -> float | None:
    """Of the rows of two matrices, r1 x n and r2 x n; None if either is zero."""
    own, beside = one.detach().double(), other.detach().double()
    (whiten, rank), (whiten_other, rank_other) = _whitening(own @ own.mT), _whitening(beside @ beside.mT)
    if not min(rank, rank_other):
        return None
    cosines = whiten @ (own @ beside.mT).cpu() @ whiten_other.mT
    return cosines.square().sum().item() / min(rank, rank_other)


def _whitening(gram: Tensor) -> tuple[Tensor, int]:
    """K with K gram K^T = I, rank x r on the CPU, and that rank."""
    values, vectors = torch.linalg.eigh(gram.cpu())
    kept = values > NEGLIGIBLE * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors[:, kept] / values[kept].sqrt()).mT, int(kept.sum())
