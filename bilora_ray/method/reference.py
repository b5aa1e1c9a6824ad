"""Bi-LoRA, and plain LoRA, word for word from the paper: to be read, and to compare fast code with.

Liu et al., "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models", ICLR 2026,
arXiv 2508.19564; equation numbers are its own. Sharpness-aware minimization (SAM) looks for flat minima: weights whose
whole neighbourhood has a low loss. Bi-LoRA keeps the adversarial weight perturbation of SAM in a second low-rank
adapter, the auxiliary, which ascends in the same backward pass in which the primary descends.

Nothing here is fast: every m x n product B A is formed, and a step is written out. It needs torch alone, and knows no
model: the loss is a function of the adapted weights. `bilora_ray.method.BiLoraAdamW` computes the same on a PEFT model
without forming a product, which the tests show in float64.

The paper leaves the scaling s = alpha / r out of its formulas. Here dW/dB1 brings s1, dW/dB2 brings s2, and the radius
is measured on the effective perturbation s2 B2 A2, so that one rho means the same at every rank and alpha.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Name of an adapted weight -> its value, m x n.
Weights = dict[str, Tensor]
# L(W), a scalar.
Loss = Callable[[Weights], Tensor]
# Name of an adapted weight, name of a factor -> dL/dfactor.
Gradients = dict[tuple[str, str], Tensor]


@dataclass
class LoraLayer:
    """One weight with its primary adapter, which is the task's.

    Attributes:
        W0: m x n, frozen.
        A1: r1 x n; starts random.
        B1: m x r1; starts at 0.
        s1: alpha1 / r1.
    """

    W0: Tensor
    A1: Tensor
    B1: Tensor
    s1: float


@dataclass
class BiLoraLayer(LoraLayer):
    """And with its auxiliary adapter, which is the perturbation.

    Attributes:
        A2: r2 x n; starts random.
        B2: m x r2; starts at 0.
        s2: alpha2 / r2.
    """

    A2: Tensor
    B2: Tensor
    s2: float


class ReferenceLora:
    """LoRA: minimise L(W0 + s1 B1 A1) over B1 and A1, by AdamW.

    Args:
        layers: by the name of the weight; their factors are replaced at each step. In float64, to compare with.
        learning_rate: lr.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: limit on the gradient's norm over all factors; None for no limit.
    """

    def __init__(
        self,
        layers: Mapping[str, LoraLayer],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.layers = layers
        self.max_grad_norm = max_grad_norm
        self.adam: dict[tuple[str, str], AdamW] = defaultdict(lambda: AdamW(learning_rate, weight_decay))

    def step(self, loss: Loss) -> float:
        """One step, with one backward pass. Returns the loss before it."""
        W = self.weights()
        value, G = value_and_gradient(loss, W)

        descent: Gradients = {}
        for name, layer in self.layers.items():
            descent[name, "B1"] = layer.s1 * G[name] @ layer.A1.T
            descent[name, "A1"] = layer.s1 * layer.B1.T @ G[name]
        descent = limited(descent, self.max_grad_norm)

        for name, layer in self.layers.items():
            layer.B1 = self.adam[name, "B1"].moved(layer.B1, descent[name, "B1"])
            layer.A1 = self.adam[name, "A1"].moved(layer.A1, descent[name, "A1"])
        return value

    def weights(self) -> Weights:
        """What is evaluated and exported: W0 + s1 B1 A1."""
        return {name: layer.W0 + layer.s1 * layer.B1 @ layer.A1 for name, layer in self.layers.items()}


class ReferenceBiLora:
    """Bi-LoRA: minimise over B1, A1 the maximum over ||s2 B2 A2||_F <= rho of L(W0 + s1 B1 A1 + s2 B2 A2) (Eq. 8).

    Args:
        layers: by the name of the weight; their factors are replaced at each step. In float64, to compare with.
        learning_rate: lr of the primary.
        rho: radius of the perturbation over all layers at once.
        auxiliary_learning_rate: lr2; None for `learning_rate`, the paper's choice.
        weight_decay: AdamW's, decoupled, of the primary only.
        max_grad_norm: limit on the gradient's norm, for each adapter by itself; None for no limit.
    """

    # The auxiliary goes up the loss.
    ascends = 1.0

    def __init__(
        self,
        layers: Mapping[str, BiLoraLayer],
        *,
        learning_rate: float,
        rho: float,
        auxiliary_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        lr2 = learning_rate if auxiliary_learning_rate is None else auxiliary_learning_rate
        self.layers = layers
        self.rho = rho
        self.max_grad_norm = max_grad_norm
        self.primary: dict[tuple[str, str], AdamW] = defaultdict(lambda: AdamW(learning_rate, weight_decay))
        self.auxiliary: dict[tuple[str, str], AdamW] = defaultdict(lambda: AdamW(lr2, weight_decay=0.0))

    def step(self, loss: Loss) -> float:
        """One step, with one backward pass. Returns the loss before it, which is that at the perturbed weight."""
        # Eq. 7: both adapters are in the weight.
        W = {
            name: layer.W0 + layer.s1 * layer.B1 @ layer.A1 + layer.s2 * layer.B2 @ layer.A2
            for name, layer in self.layers.items()
        }
        value, G = value_and_gradient(loss, W)

        # Eq. 9: one gradient G = dL/dW at the perturbed weight serves both.
        descent: Gradients = {}
        ascent: Gradients = {}
        for name, layer in self.layers.items():
            descent[name, "B1"] = layer.s1 * G[name] @ layer.A1.T
            descent[name, "A1"] = layer.s1 * layer.B1.T @ G[name]
            ascent[name, "B2"] = layer.s2 * G[name] @ layer.A2.T
            ascent[name, "A2"] = layer.s2 * layer.B2.T @ G[name]
        descent = limited(descent, self.max_grad_norm)
        ascent = limited(ascent, self.max_grad_norm)

        # The primary goes down, the auxiliary up.
        for name, layer in self.layers.items():
            layer.B1 = self.primary[name, "B1"].moved(layer.B1, descent[name, "B1"])
            layer.A1 = self.primary[name, "A1"].moved(layer.A1, descent[name, "A1"])
            layer.B2 = self.auxiliary[name, "B2"].moved(layer.B2, -self.ascends * ascent[name, "B2"])
            layer.A2 = self.auxiliary[name, "A2"].moved(layer.A2, -self.ascends * ascent[name, "A2"])

        self.project()
        return value

    def project(self) -> None:
        """Eq. 10: back into the ball, all layers by one factor; each product B2 A2 keeps its direction."""
        c = self.auxiliary_norm()
        if c > self.rho:
            for layer in self.layers.values():
                layer.B2 = layer.B2 * (self.rho / c) ** 0.5
                layer.A2 = layer.A2 * (self.rho / c) ** 0.5

    def auxiliary_norm(self) -> float:
        """c = sqrt(sum_j ||s2 B2_j A2_j||_F^2) over all layers j (Eq. 10)."""
        return norm([layer.s2 * layer.B2 @ layer.A2 for layer in self.layers.values()])

    def weights(self) -> Weights:
        """What is evaluated and exported: W0 + s1 B1 A1. The auxiliary never is."""
        return {name: layer.W0 + layer.s1 * layer.B1 @ layer.A1 for name, layer in self.layers.items()}


class AdamW:
    """AdamW of one tensor (Loshchilov and Hutter, 2019), with torch's betas and epsilon.

    Args:
        learning_rate: lr.
        weight_decay: decoupled.
    """

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.t = 0
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def moved(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """`parameter` after one more step down its `gradient`."""
        self.t += 1
        self.m = 0.9 * self.m + (1 - 0.9) * gradient
        self.v = 0.999 * self.v + (1 - 0.999) * gradient**2
        m_hat = self.m / (1 - 0.9**self.t)
        v_hat = self.v / (1 - 0.999**self.t)
        parameter = parameter - self.learning_rate * self.weight_decay * parameter
        return parameter - self.learning_rate * m_hat / (v_hat**0.5 + 1e-8)


def value_and_gradient(loss: Loss, W: Weights) -> tuple[float, Weights]:
    """L(W), and G = dL/dW by the name of the weight."""
    W = {name: weight.detach().requires_grad_(True) for name, weight in W.items()}
    value = loss(W)
    G = torch.autograd.grad(value, list(W.values()))
    return float(value.detach()), dict(zip(W, G, strict=True))


def limited(gradients: Gradients, max_grad_norm: float | None) -> Gradients:
    """`gradients`, made shorter if their norm is greater than the limit, as torch's `clip_grad_norm_` does it."""
    total = norm(list(gradients.values())) + 1e-6
    if max_grad_norm is None or total <= max_grad_norm:
        return gradients
    return {key: gradient * max_grad_norm / total for key, gradient in gradients.items()}


def norm(tensors: list[Tensor]) -> float:
    """The Frobenius norm of all `tensors` together."""
    return sum(float((tensor**2).sum()) for tensor in tensors) ** 0.5
