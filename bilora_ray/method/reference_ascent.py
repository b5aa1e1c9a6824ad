"""Bi-LoRA with another ascent, in dense algebra: twins of `ascent`, as `reference` has the paper's.

The perturbation is made anew in each step, of G = dL/dW at the perturbed weight. Nothing here is fast: projections are
m x m and n x n, and it needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bilora_ray.method.reference import (
    BiLoraLayer,
    Gradients,
    Loss,
    ReferenceLora,
    Weights,
    limited,
    norm,
    value_and_gradient,
)


class ReferenceTangent(ReferenceLora):
    """The tangent rule: s2 B2 A2 = rho T_r2 / ||T_r2||, T = P_B G + G P_A - P_B G P_A.

    T is the projection of G on the tangent space, at [B2 B1] [A2; A1], of the matrices of its rank; T_r2 its best
    approximation of rank r2, and the norm is over all layers.

    Args:
        layers: by the name of the weight; their factors are replaced at each step. In float64, to compare with.
        learning_rate: lr of the primary.
        rho: the norm of the perturbation over all layers, from the first step on.
        weight_decay: AdamW's, decoupled, of the primary.
        max_grad_norm: limit on the gradient's norm of the primary; None for no limit.
    """

    def __init__(
        self,
        layers: Mapping[str, BiLoraLayer],
        *,
        learning_rate: float,
        rho: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(layers, learning_rate=learning_rate, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self.perturbed = layers
        self.rho = rho
        self.t = 0

    def step(self, loss: Loss) -> float:
        """One step, with one backward pass. Returns the loss before it, which is that at the perturbed weight."""
        W = {
            name: layer.W0 + layer.s1 * layer.B1 @ layer.A1 + layer.s2 * layer.B2 @ layer.A2
            for name, layer in self.perturbed.items()
        }
        value, G = value_and_gradient(loss, W)
        descent: Gradients = {}
        for name, layer in self.perturbed.items():
            descent[name, "B1"] = layer.s1 * G[name] @ layer.A1.T
            descent[name, "A1"] = layer.s1 * layer.B1.T @ G[name]
        descent = limited(descent, self.max_grad_norm)
        # Of the factors at which the gradient is.
        self.ascend(G)
        for name, layer in self.perturbed.items():
            layer.B1 = self.adam[name, "B1"].moved(layer.B1, descent[name, "B1"])
            layer.A1 = self.adam[name, "A1"].moved(layer.A1, descent[name, "A1"])
        self.t += 1
        return value

    def ascend(self, G: Weights) -> None:
        """Replace B2 and A2 of all layers."""
        factors = {name: self.factors(layer, G[name]) for name, layer in self.perturbed.items()}
        total = norm([B @ A for B, A in factors.values()])
        for name, layer in self.perturbed.items():
            B, A = factors[name]
            layer.B2, layer.A2 = B * self.rho / (layer.s2 * total), A

    def factors(self, layer: BiLoraLayer, G: Tensor) -> tuple[Tensor, Tensor]:
        """U S and V^T of the projection's truncated SVD."""
        U_B = basis(torch.cat([of_norm_1(layer.B2), of_norm_1(layer.B1)], dim=1))
        U_A = basis(torch.cat([of_norm_1(layer.A2), of_norm_1(layer.A1)]).T)
        P_B, P_A = U_B @ U_B.T, U_A @ U_A.T
        T = P_B @ G + G @ P_A - P_B @ G @ P_A
        U, S, Vh = torch.linalg.svd(T, full_matrices=False)
        r2 = len(layer.A2)
        return U[:, :r2] * S[:r2], Vh[:r2]


class ReferenceHalfStep(ReferenceTangent):
    """Half a step of subspace iteration: s2 B2 A2 = rho E / ||E||, E = G P_A and P_B G in turn.

    The projections are on the spans of B2 and A2.
    """

    def factors(self, layer: BiLoraLayer, G: Tensor) -> tuple[Tensor, Tensor]:
        """Of E: the orthonormal basis of a span, and what G makes of it."""
        if self.t % 2 == 0:
            V = basis(layer.A2.T)
            return G @ V, V.T
        U = basis(layer.B2)
        E = U.T @ G
        return U * norm([E]), E / norm([E])


def of_norm_1(X: Tensor) -> Tensor:
    """`X` of norm 1; 0 stays."""
    return X / norm([X]) if norm([X]) > 0 else X


def basis(X: Tensor, dependent: float = 1e-5) -> Tensor:
    """An orthonormal basis of the span of the columns, less what has under 1e-5 of the greatest squared length."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[:, dependent * S[0] ** 2 < S**2]
