"""Full fine-tuning: AdamW over all of the model's own weights, the ceiling of what an adapter is measured by."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bilora_ray.method.base import Descent, MethodAdamW, Place, descent_group
from bilora_ray.method.flat import with_gradients

LOW = (torch.bfloat16, torch.float16)
# What a state has besides AdamW's own, of a weight in low precision.
MASTER = "master"


class FullAdamW(MethodAdamW):
    """AdamW over all that a model without an adapter trains.

    A weight in bf16 has a master in fp32 in `state`, with moments in fp32: that is what moves, and the weight is the
    master, rounded (arXiv 1710.03740, section 3.1). In bf16 itself most of AdamW's steps would be rounded away.

    Args:
        model: with its weights trainable.
        learning_rate: lr.
        weight_decay: AdamW's, decoupled, of all weights, biases and norms too.
        max_grad_norm: limit on the gradient's norm, applied inside `step`; None for no limit.

    Raises:
        ValueError: there is nothing to train, or max_grad_norm is not positive.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, max_grad_norm: float | None = None
    ) -> None:
        super().__init__([descent_group(model, learning_rate, weight_decay, max_grad_norm)])
        self._is_low = any(parameter.dtype in LOW for parameter in self.param_groups[0]["params"])

    def _update(self) -> None:
        if not self._is_low:
            super()._update()
            return
        for group in self.param_groups:
            moving, gradients = with_gradients(group["params"])
            share = _share(gradients, group["max_grad_norm"])
            for parameter, gradient in zip(moving, gradients, strict=True):  # one by one: fp32 copies would be many
                self._move(parameter, gradient.float() * share, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """AdamW's step of one weight, down its fp32 `gradient`."""
        state = self._state_of(parameter)
        moved = state.get(MASTER, parameter)
        beta1, beta2 = group["betas"]
        adamw(
            [moved],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        if moved is not parameter:
            parameter.copy_(moved)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            master = parameter.detach().float()
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            if parameter.dtype in LOW:
                state[MASTER] = master
        return state


def build(model: nn.Module, place: Place, **descent: Unpack[Descent]) -> FullAdamW:
    """Full fine-tuning of `model`. ValueError if it has an adapter, or nothing to train."""
    if isinstance(model, PeftModel):
        raise ValueError("full fine-tuning moves a model's own weights; give it the model without an adapter")
    place(model)
    return FullAdamW(model, **descent)


def _share(gradients: list[Tensor], max_grad_norm: float | None) -> Tensor | float:
    """What is left of the `gradients` once their norm is limited, as torch's `clip_grad_norm_` has it; all in fp32."""
    if max_grad_norm is None or not gradients:
        return 1.0
    norms = torch._foreach_norm(gradients, 2.0, torch.float32)
    return (max_grad_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
