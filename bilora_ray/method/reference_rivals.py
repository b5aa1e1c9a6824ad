"""What Bi-LoRA is compared with, word for word from the sources: twins of the fast code, as `reference` has Bi-LoRA's.

Nothing here is fast, and it needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilora_ray.method.reference import (
    AdamW,
    BiLoraLayer,
    Gradients,
    Loss,
    ReferenceBiLora,
    ReferenceLora,
    Weights,
    limited,
    norm,
    value_and_gradient,
)


class ReferenceFull:
    """Full fine-tuning: minimise L(W) over all weights, by AdamW.

    Args:
        weights: by name, biases and norms too; replaced at each step.
        learning_rate: lr.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: limit on the gradient's norm over all weights; None for no limit.
    """

    def __init__(
        self, weights: Weights, *, learning_rate: float, weight_decay: float = 0.0, max_grad_norm: float | None = None
    ) -> None:
        self.W = weights
        self.max_grad_norm = max_grad_norm
        self.adam = {name: AdamW(learning_rate, weight_decay) for name in weights}

    def step(self, loss: Loss) -> float:
        """One step, with one backward pass. Returns the loss before it."""
        value, G = value_and_gradient(loss, self.W)
        gradient = limited({(name, "W"): part for name, part in G.items()}, self.max_grad_norm)
        self.W = {name: self.adam[name].moved(weight, gradient[name, "W"]) for name, weight in self.W.items()}
        return value


class ReferenceDualLora(ReferenceBiLora):
    """Bi-LoRA whose auxiliary goes down (arXiv 2508.19564, Table 5)."""

    ascends = -1.0


class ReferenceAblatedBiLora(ReferenceBiLora):
    """Bi-LoRA with another clip, or with a radius of B2 A2 (arXiv 2508.19564, Table 5 and Eq. 10 without s).

    Attributes:
        clip: `global`, `per-layer` or `none`.
        unscaled: whether s2 is left out of the norm.
    """

    clip = "global"
    unscaled = False

    def auxiliary_norm(self) -> float:
        """Over all layers j."""
        return norm([self._perturbation(layer) for layer in self.layers.values()])

    def project(self) -> None:
        """Each layer by its own factor, or all by one, or none."""
        if self.clip == "global":
            super().project()
        if self.clip == "per-layer":
            for layer in self.layers.values():
                c = norm([self._perturbation(layer)])
                if c > self.rho:
                    layer.B2, layer.A2 = layer.B2 * (self.rho / c) ** 0.5, layer.A2 * (self.rho / c) ** 0.5

    def _perturbation(self, layer: BiLoraLayer) -> Tensor:
        product = layer.B2 @ layer.A2
        return product if self.unscaled else layer.s2 * product


class ReferenceLoraSam(ReferenceLora):
    """Sharpness-aware minimization of A1 and B1 (Foret et al., ICLR 2021, Eq. 2; arXiv 2508.19564, Eq. 4).

    Attributes:
        rho: radius of the perturbation of all factors together.
    """

    rho = 0.05

    def step(self, loss: Loss) -> float:
        """One step, with two backward passes. Returns the loss before it, at the weight itself."""
        value, g = self.at(loss, {name: (layer.B1, layer.A1) for name, layer in self.layers.items()})
        self.move(self.at(loss, self.uphill(g))[1])
        return value

    def at(self, loss: Loss, factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[float, Gradients]:
        """L and its gradient for other factors B, A of each layer."""
        W = {name: self.layers[name].W0 + self.layers[name].s1 * B @ A for name, (B, A) in factors.items()}
        value, G = value_and_gradient(loss, W)
        gradient: Gradients = {}
        for name, (B, A) in factors.items():
            gradient[name, "B1"] = self.layers[name].s1 * G[name] @ A.T
            gradient[name, "A1"] = self.layers[name].s1 * B.T @ G[name]
        return value, gradient

    def uphill(self, g: Gradients) -> dict[str, tuple[Tensor, Tensor]]:
        """B1 + e_B, A1 + e_A with e = rho g / ||g||."""
        scale = self.rho / norm(list(g.values()))
        return {
            name: (layer.B1 + scale * g[name, "B1"], layer.A1 + scale * g[name, "A1"])
            for name, layer in self.layers.items()
        }

    def move(self, gradient: Gradients) -> None:
        """AdamW's step from where the factors are."""
        gradient = limited(gradient, self.max_grad_norm)
        for name, layer in self.layers.items():
            layer.B1 = self.adam[name, "B1"].moved(layer.B1, gradient[name, "B1"])
            layer.A1 = self.adam[name, "A1"].moved(layer.A1, gradient[name, "A1"])


class ReferenceLookSam(ReferenceLoraSam):
    """LookSAM (Liu et al., CVPR 2022, Algorithm 1), on A1 and B1.

    Attributes:
        every: k: the steps t with t mod k = 0 are SAM's.
        alpha: of the direction that is reused.
    """

    every = 5
    alpha = 0.7
    t = 0
    g_v: Gradients

    def step(self, loss: Loss) -> float:
        """One step. Returns the loss before it, at the weight itself."""
        value, g = self.at(loss, {name: (layer.B1, layer.A1) for name, layer in self.layers.items()})
        if self.t % self.every == 0:
            g_s = self.at(loss, self.uphill(g))[1]
            # What is left of g_s beside its projection onto g.
            along = sum(float((g_s[key] * g[key]).sum()) for key in g) / norm(list(g.values())) ** 2
            self.g_v = {key: g_s[key] - along * g[key] for key in g}
        else:
            scale = self.alpha * norm(list(g.values())) / norm(list(self.g_v.values()))
            g_s = {key: g[key] + scale * self.g_v[key] for key in g}
        self.t += 1
        self.move(g_s)
        return value


class ReferenceNoisyLora(ReferenceLora):
    """LoRA whose gradient is taken under noise: Flat-LoRA and RWP (arXiv 2409.14396, section 3.3; 2211.11489).

    The standard normal numbers are given, since no two programs draw the same.

    Attributes:
        rho: size of the noise.
        steps: of the whole training, over which the noise grows; None where its size stays.
        on_factors: whether it is on A1 and B1, and not on the merged weight.
        draws: Z of each layer and tensor: `W`, or `A1` and `B1`, for the step to come.
    """

    rho = 0.05
    steps: int | None = None
    on_factors = False
    draws: Gradients
    t = 0

    def noise(self, name: str, of: str, M: Tensor) -> Tensor:
        """sigma_i Z_ij with sigma_i = c rho ||row i of M|| / sqrt(n), no gradient through it."""
        c = 1.0 if self.steps is None else 0.5 * (1 - math.cos(math.pi * self.t / self.steps))
        sigma = c * self.rho * M.norm(dim=1, keepdim=True) / math.sqrt(M.shape[1])
        return sigma * self.draws[name, of]

    def step(self, loss: Loss) -> float:
        """One step, with one backward pass. Returns the loss under the noise."""
        factors, W = {}, {}
        for name, layer in self.layers.items():
            B, A = layer.B1, layer.A1
            if self.on_factors:
                B, A = B + self.noise(name, "B1", B), A + self.noise(name, "A1", A)
            factors[name] = B, A
            W[name] = layer.W0 + layer.s1 * B @ A
            if not self.on_factors:
                W[name] = W[name] + self.noise(name, "W", W[name])
        self.t += 1
        value, G = value_and_gradient(loss, W)
        gradient: Gradients = {}
        for name, (B, A) in factors.items():
            gradient[name, "B1"] = self.layers[name].s1 * G[name] @ A.T
            gradient[name, "A1"] = self.layers[name].s1 * B.T @ G[name]
        gradient = limited(gradient, self.max_grad_norm)
        for name, layer in self.layers.items():
            layer.B1 = self.adam[name, "B1"].moved(layer.B1, gradient[name, "B1"])
            layer.A1 = self.adam[name, "A1"].moved(layer.A1, gradient[name, "A1"])
        return value


class ReferenceEsam(ReferenceLoraSam):
    """ESAM (Du et al., ICLR 2022, Algorithm 1), on A1 and B1.

    Attributes:
        beta: share of the factors that are perturbed.
        gamma: share of the rows that the gradient is of.
        chosen: the factors that are perturbed in the step to come: given, since no two programs draw the same.
    """

    beta = 0.5
    gamma = 0.5
    chosen: set[tuple[str, str]]

    def step_on(self, rows: Sequence[Loss]) -> float:
        """One step on rows of equal weight, each with its loss. Returns the mean before it, at the weight itself."""
        here = {name: (layer.B1, layer.A1) for name, layer in self.layers.items()}
        losses = [self.at(row, here)[0] for row in rows]
        g = self.at(lambda W: mean(rows, W), here)[1]
        there = self.uphill({key: part if key in self.chosen else torch.zeros_like(part) for key, part in g.items()})
        rise = [self.at(row, there)[0] - loss for row, loss in zip(rows, losses, strict=True)]
        count = max(1, int(self.gamma * len(rows)))
        sharpest = sorted(range(len(rows)), key=lambda row: -rise[row])[:count]
        self.move(self.at(lambda W: mean([rows[row] for row in sharpest], W), there)[1])
        return sum(losses) / len(losses)

    def uphill(self, g: Gradients) -> dict[str, tuple[Tensor, Tensor]]:
        """B1 + e_B, A1 + e_A with e = rho / beta g / ||g||; where nothing is chosen, nothing moves."""
        length = norm(list(g.values()))
        scale = self.rho / self.beta / length if length else 0.0
        return {
            name: (layer.B1 + scale * g[name, "B1"], layer.A1 + scale * g[name, "A1"])
            for name, layer in self.layers.items()
        }


def mean(rows: Sequence[Loss], W: dict[str, Tensor]) -> Tensor:
    """Of the losses of `rows` at W."""
    return torch.stack([row(W) for row in rows]).mean()


class ReferenceBar(ReferenceLora):
    """Balancedness-aware regularization of each product B1 A1 (Li et al., NeurIPS 2024), before AdamW's step.

    Attributes:
        by_gradients: nBAR, else oBAR.
        alpha: the coefficient at the first step.
        steps: of the whole training; the coefficient falls linearly to 0 over them.
    """

    by_gradients = True
    alpha = 0.25
    steps = 1
    t = 0

    def step(self, loss: Loss) -> float:
        """One step, with one backward pass. Returns the loss before it."""
        value, G = value_and_gradient(loss, self.weights())
        gradient: Gradients = {}
        for name, layer in self.layers.items():
            gradient[name, "B1"] = layer.s1 * G[name] @ layer.A1.T
            gradient[name, "A1"] = layer.s1 * layer.B1.T @ G[name]
        eta = self.alpha * (1 - self.t / self.steps) * self.adam["", ""].learning_rate
        self.t += 1
        for name, layer in self.layers.items():
            if self.by_gradients:
                grows = torch.sign(gradient[name, "A1"].norm() - gradient[name, "B1"].norm())
            else:
                grows = torch.sign(layer.B1.norm() - layer.A1.norm())
            layer.A1 = (1 + eta * grows) * layer.A1
            layer.B1 = (1 - eta * grows) * layer.B1
        gradient = limited(gradient, self.max_grad_norm)
        for name, layer in self.layers.items():
            layer.B1 = self.adam[name, "B1"].moved(layer.B1, gradient[name, "B1"])
            layer.A1 = self.adam[name, "A1"].moved(layer.A1, gradient[name, "A1"])
        return value
