"""AdamW for LoRA, and for Bi-LoRA: descent on the primary, ascent on the auxiliary, projection, in one step (Eq. 9-10).

Every method is an optimizer with the same seam: a training loop calls `optimizer.step(closure)` and nothing else, so
that a method which needs the loss twice a step fits the same loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bilora_ray.method.adapters import auxiliary_factors, has_auxiliary, primary_parameters
from bilora_ray.method.radius import Factors, perturbation_norm, project_

Closure = Callable[[], Tensor]


class MethodAdamW(torch.optim.AdamW):
    """What the methods share: AdamW whose step evaluates the loss, limits each group's gradient, and updates.

    A group holds `max_grad_norm` besides AdamW's own settings.
    """

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from the gradients that `closure`, or the caller before, has left.

        Args:
            closure: clears the gradients, runs forward and backward, and returns the loss. As in torch, optional.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_update()
        # torch wraps the step of each class that is ever instantiated: super().step() could run step hooks twice.
        inspect.unwrap(torch.optim.AdamW.step)(self)
        self._after_update()
        return loss

    def metrics(self) -> dict[str, float]:
        """What the method has to report besides the loss, now."""
        return {}

    def _before_update(self) -> None:
        """What happens to the gradients first: each group's are limited by themselves."""
        for group in self.param_groups:
            if group["max_grad_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(group["params"], group["max_grad_norm"])

    def _after_update(self) -> None:
        """What a method does to the parameters once they have moved."""


class LoraAdamW(MethodAdamW):
    """Plain LoRA: AdamW over all that the model trains.

    Args:
        model: a PEFT LoRA model without an auxiliary.
        learning_rate: lr.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: limit on the gradient's norm, applied inside `step`; None for no limit.

    Raises:
        ValueError: the model has an auxiliary, or nothing to train, or max_grad_norm is not positive.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, max_grad_norm: float | None = None
    ) -> None:
        if has_auxiliary(model):
            raise ValueError("LoraAdamW would leave the auxiliary adapter as it is; use BiLoraAdamW, or detach it")
        super().__init__([_descent_group(model, learning_rate, weight_decay, max_grad_norm)])


class BiLoraAdamW(MethodAdamW):
    """Bi-LoRA: AdamW descends on the primary and all else that is trained, and ascends on the auxiliary (Eq. 9).

    After each update the auxiliary is projected onto ||s2 B2 A2||_F <= rho over all layers (Eq. 10). The two branches
    are two parameter groups: gradient limits are separate, so neither changes the other's, and weight decay is the
    primary's only. Learning-rate schedules drive both. The loss that `step` returns is at the perturbed weight.

    Args:
        model: a PEFT LoRA model with `attach_auxiliary` done.
        learning_rate: lr of the primary.
        rho: radius of the perturbation, > 0.
        auxiliary_learning_rate: lr2; None for `learning_rate`, the paper's choice.
        weight_decay: AdamW's, decoupled, of the primary.
        max_grad_norm: limit on each branch's gradient norm, applied inside `step`; None for no limit.

    Raises:
        ValueError: the model has no auxiliary or nothing else to train, or rho or max_grad_norm is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        rho: float,
        auxiliary_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be > 0, got {rho}")
        factors = auxiliary_factors(model)
        ascent = {
            "params": [tensor for layer in factors for tensor in (layer.A, layer.B)],
            "scalings": [layer.scaling for layer in factors],
            "lr": learning_rate if auxiliary_learning_rate is None else auxiliary_learning_rate,
            "weight_decay": 0.0,
            "maximize": True,
            "max_grad_norm": max_grad_norm,
            "rho": rho,
        }
        super().__init__([_descent_group(model, learning_rate, weight_decay, max_grad_norm), ascent])

    @property
    def auxiliary_norm(self) -> Tensor:
        """c = ||s2 B2 A2||_F over all layers, now: a scalar tensor, <= rho after a step."""
        return perturbation_norm(self._factors())

    def metrics(self) -> dict[str, float]:
        """`auxiliary_norm`, as a number."""
        return {"auxiliary_norm": float(self.auxiliary_norm)}

    def _before_update(self) -> None:
        """Limit the gradients. RuntimeError if the loss did not see the auxiliary: that would train plain LoRA."""
        descent, ascent = (any(p.grad is not None for p in group["params"]) for group in self.param_groups[:2])
        if descent and not ascent:
            raise RuntimeError("the auxiliary adapter got no gradient: the forward pass needs model.train()")
        super()._before_update()

    def _after_update(self) -> None:
        project_(self._factors(), self.param_groups[1]["rho"])

    def _factors(self) -> list[Factors]:
        # Read from the group: a wrapper that shards or moves the parameters replaces them there.
        ascent = self.param_groups[1]
        return list(map(Factors, ascent["params"][0::2], ascent["params"][1::2], ascent["scalings"]))


def _descent_group(
    model: nn.Module, learning_rate: float, weight_decay: float, max_grad_norm: float | None
) -> dict[str, Any]:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
    params = list(primary_parameters(model).values())
    if not params:
        raise ValueError("the model has nothing to train; was its adapter loaded without is_trainable=True?")
    return {
        "params": params,
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
    }
