"""Gaussian noise on weights while a loss is computed: on the frozen ones of adapted layers, or on the factors.

No weight is changed for the noise on the frozen ones, so there is nothing to put back, and no copy of the model: a
layer adds it to its weight as it multiplies, and makes the same sum again for the backward pass. The numbers are a
function of seed, step and layer, the same on every worker and after a resume.

Fresh normal numbers for each weight, twice a step, would take a CPU a quarter of the step. So all are read from one
table of standard normal draws, each layer's from a place that is drawn anew in each step, as evolution strategies have
it (Salimans et al., 2017, arXiv 1703.03864), and each row of a weight with a sign that is drawn anew too. Each number
is standard normal, and those of two rows are uncorrelated. What is lost is independence: where two layers, or two
steps, read overlapping parts of the table, the one has some of the numbers of the other, at other weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bilora_ray.method.layers import PRIMARY, FusedLayer

# By so many numbers the table is longer than what the largest tensor reads of it, and every so many-th is a place to
# begin at: a GPU reads fastest from there.
SPARE, EVERY = 2**21, 16


class Noise(NamedTuple):
    """Of a weight: `scale` (m x 1) times `draws` (m x n), a view of the table."""

    draws: Tensor
    scale: Tensor


class Draws:
    """Standard normal numbers for some matrices, others in each step.

    Args:
        seed: of the table, and with the step of the places in it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, step: int, sizes: Sequence[Tensor], like: Sequence[Tensor]) -> list[Noise]:
        """The noise of `step`: for each tensor that it is to be added to one with rows of these `sizes`.

        Args:
            step: from 0 on.
            sizes: of each its rows' standard deviations, m.
            like: m x n each.
        """
        generator = torch.Generator().manual_seed(_key(self._seed, step))
        length = max(one.numel() for one in like) + SPARE
        places = torch.randint(2**31, (len(like),), generator=generator).tolist()
        rows = [len(size) for size in sizes]
        signs = torch.randint(2, (sum(rows),), generator=generator).mul_(2).sub_(1)
        found = []
        here: dict[torch.device, Sequence[Tensor]] = {}
        for number, (size, one, place) in enumerate(zip(sizes, like, places, strict=True)):
            if one.device not in here:
                here[one.device] = signs.to(one.device, non_blocking=True).split(rows)
            begin = place % ((length - one.numel()) // EVERY + 1) * EVERY
            draws = self._table(one, length)[begin : begin + one.numel()].view(one.shape)
            found.append(Noise(draws, (size * here[one.device][number]).to(one.dtype).unsqueeze(1)))
        return found

    def _table(self, like: Tensor, length: int) -> Tensor:
        kind = like.device, like.dtype
        if (table := self._tables.get(kind)) is None:
            # By the CPU's generator: the same numbers on every machine.
            draws = torch.randn(length, generator=torch.Generator().manual_seed(_key(self._seed)))
            table = self._tables[kind] = draws.to(like.device, like.dtype)
        return table


class NoisyLayer(FusedLayer):
    """Mixin over a PEFT LoRA layer that computes with W0 + noise + s1 B1 A1 in training, while it has a `noise`."""

    noise: Noise | None = None

    @property
    def weight_in_rows(self) -> Tensor:
        """W0, m x n, a row for each output."""
        weight = cast(Tensor, self.base_layer.weight)
        return weight.T if self.fan_in_fan_out else weight

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        if self.noise is None or not self.training:
            return super()._fused_forward(x, names)
        primary = self.change(PRIMARY)
        hidden = self._hidden(x, (PRIMARY,), [primary]).reshape(-1, len(primary.A))
        up, bias = primary.B.to(x.dtype).T, cast(Tensor | None, self.base_layer.bias)
        # The small term first, as in `layers.add_base`.
        output = torch.mm(hidden, up) if bias is None else torch.addmm(bias, hidden, up)
        output = _Product.apply(output, x.reshape(-1, x.shape[-1]), self.weight_in_rows, *self.noise)
        return output.view(*x.shape[:-1], len(primary.B))


class _Product(torch.autograd.Function):
    """output + x (weight + scale draws)^T, which keeps neither x nor the sum for the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, weight: Tensor, draws: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, draws, scale)
        return torch.addmm(output, x, torch.addcmul(weight, draws, scale).T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_x = gradient @ torch.addcmul(*ctx.saved_tensors) if ctx.needs_input_grad[1] else None
        return gradient, of_x, None, None, None


class WeightNoise:
    """Noise on the merged weights W0 + s1 B1 A1: of row i of a layer N(0, (size ||row i|| / sqrt(n))^2).

    A row of n numbers so moves by about `size` of its own norm. The norms are those of the moment, and no gradient goes
    through them.

    Args:
        layers: all that are adapted.
        seed: see `Draws`.

    Raises:
        ValueError: weights are cut into parts.
    """

    def __init__(self, layers: Sequence[NoisyLayer], seed: int) -> None:
        _check_whole([layer.weight_in_rows for layer in layers])
        self._layers = layers
        self._draws = Draws(seed)
        self._squares: list[Tensor] = []

    @contextmanager
    def at(self, step: int, size: float) -> Iterator[None]:
        """In it the layers compute with the noise of `step`, in each pass with the same."""
        sizes = [norms * (size / layer.weight_in_rows.shape[1] ** 0.5) for layer, norms in self._norms()]
        noises = self._draws.at(step, sizes, [layer.weight_in_rows for layer in self._layers])
        try:
            for layer, noise in zip(self._layers, noises, strict=True):
                layer.noise = noise
            yield
        finally:
            for layer in self._layers:
                layer.noise = None

    @torch.no_grad()
    def _norms(self) -> Iterator[tuple[NoisyLayer, Tensor]]:
        """||row i of W0 + s1 B1 A1|| of each layer, without that sum: only B1 and A1 move."""
        if not self._squares:
            self._squares = [_squares(layer) for layer in self._layers]
        for layer, squares in zip(self._layers, self._squares, strict=True):
            A, B, scaling = layer.change(PRIMARY)
            weight = layer.weight_in_rows
            B = scaling * B.to(squares.dtype)
            across = (weight @ A.to(weight.dtype).T).to(squares.dtype)
            A = A.to(squares.dtype)
            yield layer, (squares + (B * (2 * across + B @ (A @ A.T))).sum(1)).clamp(min=0.0).sqrt()


class FactorNoise:
    """Noise on A1 and B1: of row i of a factor N(0, (size ||row i|| / sqrt(n))^2), n its length.

    Args:
        factors: A1 and B1 of all layers.
        seed: see `Draws`.

    Raises:
        ValueError: they are cut into parts.
    """

    def __init__(self, factors: Sequence[Tensor], seed: int) -> None:
        _check_whole(factors)
        self._factors = factors
        self._draws = Draws(seed)

    @contextmanager
    def at(self, step: int, size: float) -> Iterator[None]:
        """In it the factors have the noise of `step` on them; after it they are what they were, to the bit."""
        factors = [factor.detach() for factor in self._factors]
        before = [factor.clone() for factor in factors]
        sizes = [factor.norm(dim=1) * (size / factor.shape[1] ** 0.5) for factor in factors]
        try:
            for factor, noise in zip(factors, self._draws.at(step, sizes, factors), strict=True):
                factor.addcmul_(*noise)
            yield
        finally:
            torch._foreach_copy_(factors, before)


def _check_whole(weights: Sequence[Tensor]) -> None:
    if any(isinstance(weight, DTensor) for weight in weights):
        raise ValueError("the noise is on whole weights, not on those that workers have parts of")


def _squares(layer: NoisyLayer) -> Tensor:
    """||row i of W0||^2, in fp32 at the least."""
    weight = layer.weight_in_rows
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()


def _key(*numbers: int) -> int:
    """A seed of torch's generator, which reads 32 bits of one."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")
