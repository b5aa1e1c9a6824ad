"""Bi-LoRA word for word as the paper writes it: explicit m x n weights, explicit AdamW, nothing clever.

Equation numbers are those of arXiv 2508.19564. The paper leaves the scaling s = alpha / r out of its formulas; here
dW/dB1 brings s1, dW/dB2 brings s2, and the radius is measured on s2 B2 A2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass
class Adam:
    """One tensor's AdamW, from the formulas of Loshchilov and Hutter (2019)."""

    lr: float
    weight_decay: float
    ascend: bool
    t: int = 0
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0

    def move(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        if self.ascend:
            gradient = -gradient
        self.t += 1
        self.m = 0.9 * self.m + (1 - 0.9) * gradient
        self.v = 0.999 * self.v + (1 - 0.999) * gradient * gradient
        m_hat = self.m / (1 - 0.9**self.t)
        v_hat = self.v / (1 - 0.999**self.t)
        parameter = parameter - self.lr * self.weight_decay * parameter
        return parameter - self.lr * m_hat / (torch.sqrt(v_hat) + 1e-8)


@dataclass
class Layer:
    """One adapted layer."""

    W0: Tensor
    A1: Tensor
    B1: Tensor
    s1: float
    A2: Tensor
    B2: Tensor
    s2: float
    adam: dict[str, Adam] = field(default_factory=dict)


class Twin:
    """Bi-LoRA on a plain model whose adapted weights are replaced by W at every step.

    Args:
        model: the base model; only `layers` are trained.
        layers: by the name of the adapted weight in `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Layer],
        *,
        lr: float,
        lr2: float,
        rho: float,
        weight_decay: float,
        max_grad_norm: float | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.rho = rho
        self.max_grad_norm = max_grad_norm
        for layer in layers.values():
            layer.adam = {name: Adam(lr, weight_decay, ascend=False) for name in ("A1", "B1")}
            layer.adam |= {name: Adam(lr2, 0.0, ascend=True) for name in ("A2", "B2")}

    def step(self, loss_of: Callable[[Callable[..., object]], Tensor]) -> float:
        """One step; `loss_of` computes the loss by calling the model that it is given. Returns the loss."""
        # Eq. 7: W = W0 + s1 B1 A1 + s2 B2 A2
        W = {
            name: (layer.W0 + layer.s1 * layer.B1 @ layer.A1 + layer.s2 * layer.B2 @ layer.A2).requires_grad_(True)
            for name, layer in self.layers.items()
        }
        loss = loss_of(lambda **batch: functional_call(self.model, W, kwargs=batch))
        G = dict(zip(W, torch.autograd.grad(loss, list(W.values())), strict=True))

        # Eq. 9, each branch limited by itself
        descent, ascent = {}, {}
        for name, layer in self.layers.items():
            descent[name, "B1"] = layer.s1 * G[name] @ layer.A1.T
            descent[name, "A1"] = layer.s1 * layer.B1.T @ G[name]
            ascent[name, "B2"] = layer.s2 * G[name] @ layer.A2.T
            ascent[name, "A2"] = layer.s2 * layer.B2.T @ G[name]
        for branch in (self._limited(descent), self._limited(ascent)):
            for (name, factor), gradient in branch.items():
                layer = self.layers[name]
                setattr(layer, factor, layer.adam[factor].move(getattr(layer, factor), gradient))

        # Eq. 10, over all layers at once
        c = self.norm()
        if c > self.rho:
            for layer in self.layers.values():
                layer.A2 = layer.A2 * (self.rho / c) ** 0.5
                layer.B2 = layer.B2 * (self.rho / c) ** 0.5
        return float(loss.detach())

    def norm(self) -> float:
        """c = sqrt( sum_j || s2 B2_j A2_j ||_F^2 ), from the formed products."""
        total = 0.0
        for layer in self.layers.values():
            total += float(((layer.s2 * layer.B2 @ layer.A2) ** 2).sum())
        return total**0.5

    def _limited(self, gradients: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        norm = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
        if self.max_grad_norm is None or norm + 1e-6 <= self.max_grad_norm:
            return gradients
        return {key: g * self.max_grad_norm / (norm + 1e-6) for key, g in gradients.items()}
