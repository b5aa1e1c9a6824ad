"""How sharp the loss is around an adapter's merged weight, in either of its `spaces`, on rows that stay the same.

In fp64 it is brute force's to 1e-9, the eigenvalue as near as `tolerance` says. In fp32 a rise is told from rounding
down to some 1e-6 of the loss. On a bf16 base a displacement is rounded as one sum with its layer's output, as in
`layers`: on a small Llama that left rises 2e-5 to 2e-4 of the loss off, rounded apart up to five times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bilora_ray.method.spaces import Pass, Space, add_, inner, norm, scale_


class Eigenvalue(NamedTuple):
    """The top eigenvalue of a Hessian; some eigenvalue is no farther from it than `error`, after so many `products`."""

    value: float
    error: float
    products: int


def adversarial_rises(space: Space, passes: Sequence[Pass], radii: Sequence[float]) -> list[float]:
    """L(W + a g / ||g||) - L(W) for each a of `radii`, g being the gradient of L over the same `passes`.

    Args:
        space: where W is displaced, and what norm is of: the Frobenius norm over all of its parts.
        passes: the rows. How they are cut changes nothing but roundings.
        radii: norms.

    Returns:
        A rise for each radius, in the unit of the loss; 0 where there is no gradient.
    """
    gradient = space.gradient(passes)
    length, rest = norm(gradient), space.loss(passes)
    if length == 0:
        return [0.0 for _ in radii]
    return [space.loss(passes, gradient, radius / length) - rest for radius in radii]


def m_sharpness(space: Space, batches: Sequence[Sequence[Pass]], radii: Sequence[float]) -> list[float]:
    """The mean over `batches` of each batch's own rise, along its own gradient (arXiv 2010.01412).

    There they have m rows each; one that has fewer, as the last may, counts for as many as it has.

    Args:
        space: as for `adversarial_rises`.
        batches: the passes of each: m rows, which decide what is measured, unlike how they are cut into passes.
        radii: norms.
    """
    rises = [adversarial_rises(space, passes, radii) for passes in batches]
    rows = [sum(one.rows for one in passes) for passes in batches]
    by_rows = [[count * rise for rise in of_batch] for count, of_batch in zip(rows, rises, strict=True)]
    return [math.fsum(of_radius) / sum(rows) for of_radius in zip(*by_rows, strict=True)]


def random_rises(
    space: Space, passes: Sequence[Pass], radii: Sequence[float], directions: int, seed: int = 0
) -> list[list[float]]:
    """L(W + a d) - L(W) for each a of `radii`, along random directions d normalised by filter (arXiv 1712.09913).

    Each row of d is as long as that row of the weights, so a is a share of the weights and no norm: 1 is as much as
    they are. A row of zeros, as B1's before training, is not displaced.

    Args:
        space: where W is displaced.
        passes: the rows.
        radii: shares of the weights.
        directions: how many are drawn.
        seed: of the directions.

    Returns:
        For each direction its rises.
    """
    generator = torch.Generator().manual_seed(seed)
    norms, rest = list(space.filter_norms()), space.loss(passes)
    found = []
    for _ in range(directions):
        direction = space.normal(generator)
        for part, length in zip(direction, norms, strict=True):
            part.mul_(length / part.norm(dim=1, keepdim=True))
        found.append([space.loss(passes, direction, radius) - rest for radius in radii])
    return found


def top_eigenvalue(
    space: Space, passes: Sequence[Pass], products: int = 50, tolerance: float = 1e-3, seed: int = 0
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian at W, by Lanczos' iteration.

    Three vectors are kept, in host memory. Those before are not made orthogonal to again: that lets copies of an
    eigenvalue appear beside it, and leaves the largest what it is.

    Args:
        space: whose Hessian.
        passes: the rows.
        products: of the Hessian with a vector, at the most; each takes about four times a forward and backward pass.
        tolerance: it ends once the error is below this share of the value.
        seed: of the vector to begin with.
    """
    current, before = space.normal(torch.Generator().manual_seed(seed)), space.zeros()
    scale_(current, 1 / norm(current))
    diagonal: list[float] = []
    beside = [0.0]
    while True:
        following = space.product(passes, current)
        diagonal.append(inner(following, current))
        add_(following, current, -diagonal[-1])
        add_(following, before, -beside[-1])
        beside.append(norm(following))
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside[1:-1]))
        value, error = values[-1].item(), beside[-1] * abs(vectors[-1, -1].item())
        # What is left once all of the space was seen is rounding.
        smallest = torch.finfo(space.dtype).eps * values.abs().max().item()
        if error <= max(tolerance * abs(value), smallest) or len(diagonal) == products:
            return Eigenvalue(value, error, len(diagonal))
        before, current = current, scale_(following, 1 / beside[-1])


def _tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for row, value in enumerate(beside):
        matrix[row, row + 1] = matrix[row + 1, row] = value
    return matrix
