"""Bi-LoRA: descent on the primary, ascent on the auxiliary, projection, in one step (arXiv 2508.19564, Eq. 9-10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from peft import PeftModel
from torch import Tensor, nn

from bilora_ray.method.adapters import attach_auxiliary, auxiliary_factors
from bilora_ray.method.base import MethodAdamW, Place, descent_group
from bilora_ray.method.radius import Factors, perturbation_norm, project_, project_each_

Clip = Literal["global", "per-layer", "none"]
Norm = Literal["effective", "unscaled"]
# What `clip` says -> what is done with the auxiliary's factors and rho after each update.
CLIPS: dict[Clip, Callable[[Sequence[Factors], float], object]] = {
    "global": project_,
    "per-layer": project_each_,
    "none": lambda factors, rho: None,
}


class BiLoraAdamW(MethodAdamW):
    """Bi-LoRA: AdamW descends on the primary and all else that is trained, and ascends on the auxiliary (Eq. 9).

    After each update the auxiliary is projected onto ||s2 B2 A2||_F <= rho over all layers (Eq. 10); `clip` and `norm`
    are what Table 5 of the paper has beside that, and the paper's own reading of the norm. The two branches
    are two parameter groups: gradient limits are separate, so neither changes the other's, and weight decay is the
    primary's only. Learning-rate schedules drive both. The loss that `step` returns is at the perturbed weight.

    Args:
        model: a PEFT LoRA model with `attach_auxiliary` done.
        learning_rate: lr of the primary.
        rho: radius of the perturbation, > 0.
        auxiliary_learning_rate: lr2; None for `learning_rate`, the paper's choice.
        clip: `global`: all layers together by one factor; `per-layer`: each by itself to rho; `none`.
        norm: `effective`: rho is of s2 B2 A2; `unscaled`: of B2 A2, as the paper, which leaves s out, writes it.
        weight_decay: AdamW's, decoupled, of the primary.
        max_grad_norm: limit on each branch's gradient norm, applied inside `step`; None for no limit.

    Raises:
        ValueError: the model has no auxiliary or nothing else to train, or rho or max_grad_norm is not positive.
    """

    # Whether the auxiliary goes up the loss.
    climbs = True

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        rho: float,
        auxiliary_learning_rate: float | None = None,
        clip: Clip = "global",
        norm: Norm = "effective",
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be > 0, got {rho}")
        factors = auxiliary_factors(model)
        ascent = {
            "params": [tensor for layer in factors for tensor in (layer.A, layer.B)],
            "scalings": [layer.scaling if norm == "effective" else 1.0 for layer in factors],
            "lr": learning_rate if auxiliary_learning_rate is None else auxiliary_learning_rate,
            "weight_decay": 0.0,
            "maximize": self.climbs,
            "max_grad_norm": max_grad_norm,
            "rho": rho,
            "clip": clip,
        }
        super().__init__([descent_group(model, learning_rate, weight_decay, max_grad_norm), ascent])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups[1:]:
            group.setdefault("clip", "global")  # in a checkpoint of version 0.1.0 there was no other

    @property
    def auxiliary_norm(self) -> Tensor:
        """c = ||s2 B2 A2||_F over all layers, now, or of what `norm` says: a scalar tensor, <= rho after a step."""
        return perturbation_norm(self._factors())

    def metrics(self) -> dict[str, float]:
        """`auxiliary_norm`, as a number."""
        return {"auxiliary_norm": float(self.auxiliary_norm)}

    def _before_update(self) -> None:
        """RuntimeError if the loss did not see the auxiliary: that would train plain LoRA."""
        descent, ascent = (any(p.grad is not None for p in group["params"]) for group in self.param_groups[:2])
        if descent and not ascent:
            raise RuntimeError("the auxiliary adapter got no gradient: the forward pass needs model.train()")

    def _after_update(self) -> None:
        ascent = self.param_groups[1]
        CLIPS[ascent["clip"]](self._factors(), ascent["rho"])

    def _factors(self) -> list[Factors]:
        # Read from the group: a wrapper that shards or moves the parameters replaces them there.
        ascent = self.param_groups[1]
        return list(map(Factors, ascent["params"][0::2], ascent["params"][1::2], ascent["scalings"]))


def build(
    model: PeftModel,
    place: Place,
    *,
    auxiliary_rank: int,
    rho: float,
    learning_rate: float,
    auxiliary_learning_rate: float | None,
    clip: Clip,
    norm: Norm,
    weight_decay: float,
    max_grad_norm: float | None,
) -> BiLoraAdamW:
    """Bi-LoRA on the primary adapter and a new auxiliary. ValueError if the model has other than linear layers."""
    attach_auxiliary(model, auxiliary_rank)
    place(model)
    return BiLoraAdamW(
        model,
        learning_rate=learning_rate,
        rho=rho,
        auxiliary_learning_rate=auxiliary_learning_rate,
        clip=clip,
        norm=norm,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )
