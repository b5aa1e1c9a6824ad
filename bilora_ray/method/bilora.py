"""Bi-LoRA: descent on the primary, ascent on the auxiliary, projection, in one step (arXiv 2508.19564, Eq. 9-10).

`ascent` has two rules beside the paper's by which the auxiliary is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, cast

from peft import PeftModel
from torch import Tensor, nn

from bilora_ray.method.adapters import attach_auxiliary, auxiliary_factors, of_one_gradient, primary_factors
from bilora_ray.method.ascent import half_step_, tangent_
from bilora_ray.method.base import Descent, MethodAdamW, Place, adapter_places, descent_group
from bilora_ray.method.radius import Factors, perturbation_norm, project_, project_each_
from bilora_ray.method.sides import Layer

Clip = Literal["global", "per-layer", "none"]
Norm = Literal["effective", "unscaled"]
Ascent = Literal["adamw", "tangent", "half-step"]
# Where a layer's A1 and B1 are among the parameters, and what their gradients are divided by.
Partner = Sequence[Any]
# What a checkpoint that is older than a choice had.
FIRST: dict[str, Any] = {"clip": "global", "ascent": "adamw", "turn": 0}
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
        ascent: `adamw`, the paper's; `tangent` or `half-step`.
        weight_decay: AdamW's, decoupled, of the primary.
        max_grad_norm: limit on each branch's gradient norm, applied inside `step`; None for no limit.

    Raises:
        ValueError: the model has no auxiliary or nothing else to train, rho or max_grad_norm is not positive, or
            `ascent` is not the paper's and `clip` or `auxiliary_learning_rate` is given, which it does not read, or a
            factor of the primary is frozen.
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
        ascent: Ascent = "adamw",
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be > 0, got {rho}")
        if ascent != "adamw" and (clip != "global" or auxiliary_learning_rate is not None):
            raise ValueError(f"ascent '{ascent}' has norm rho over all layers and no learning rate: no clip but global")
        factors = auxiliary_factors(model)
        auxiliary: dict[str, Any] = {
            "params": [tensor for layer in factors for tensor in (layer.A, layer.B)],
            "scalings": [layer.scaling if norm == "effective" else 1.0 for layer in factors],
            "effective": [layer.scaling for layer in factors],
            "lr": learning_rate if auxiliary_learning_rate is None else auxiliary_learning_rate,
            "weight_decay": 0.0,
            "maximize": self.climbs,
            "max_grad_norm": max_grad_norm,
            "rho": rho,
            "clip": clip,
            "ascent": ascent,
            "turn": 0,
        }
        descent = descent_group(model, learning_rate, weight_decay, max_grad_norm)
        if ascent == "tangent":
            auxiliary["partners"] = _partners(cast(PeftModel, model), descent["params"], auxiliary["scalings"])
        super().__init__([descent, auxiliary])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups[1:]:
            for key, value in FIRST.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Which gradients are of one G is this model's to say: its dropout may be another by now."""
        own = self.param_groups[1].get("partners")
        super().load_state_dict(state_dict)
        if own is not None:
            self.param_groups[1]["partners"] = own

    @property
    def auxiliary_norm(self) -> Tensor:
        """c = ||s2 B2 A2||_F over all layers, now, or of what `norm` says: a scalar tensor, <= rho after a step."""
        return perturbation_norm(self._factors())

    def metrics(self) -> dict[str, float]:
        """`auxiliary_norm`, as a number; of s2 B2 A2, whatever `norm` says."""
        scalings = self.param_groups[1].get("effective", self.param_groups[1]["scalings"])
        factors = [Factors(A, B, s2) for (A, B, _), s2 in zip(self._factors(), scalings, strict=True)]
        return {"auxiliary_norm": float(perturbation_norm(factors))}

    def _before_update(self) -> None:
        """RuntimeError if the loss did not see the auxiliary: that would train plain LoRA."""
        descent, ascent = (any(p.grad is not None for p in group["params"]) for group in self.param_groups[:2])
        if descent and not ascent:
            raise RuntimeError("the auxiliary adapter got no gradient: the forward pass needs model.train()")
        auxiliary = self.param_groups[1]
        if ascent and auxiliary["ascent"] != "adamw":
            self._rebuild(auxiliary)
            for parameter in auxiliary["params"]:
                parameter.grad = None  # AdamW leaves it where it is

    def _rebuild(self, auxiliary: dict[str, Any]) -> None:
        """The auxiliary anew, from the gradients and the factors at which they are."""
        if auxiliary["ascent"] == "tangent":
            tangent_(self._layers(auxiliary["partners"]), auxiliary["rho"])
        else:
            half_step_([Layer(factors, None) for factors in self._factors()], auxiliary["rho"], auxiliary["turn"] == 0)
            auxiliary["turn"] = 1 - auxiliary["turn"]

    def _after_update(self) -> None:
        auxiliary = self.param_groups[1]
        if auxiliary["ascent"] == "adamw":
            CLIPS[auxiliary["clip"]](self._factors(), auxiliary["rho"])

    def _layers(self, partners: Sequence[Partner | None]) -> list[Layer]:
        params = self.param_groups[0]["params"]
        primaries = [None if one is None else Factors(params[one[0]], params[one[1]], one[2]) for one in partners]
        return list(map(Layer, self._factors(), primaries))

    def _factors(self) -> list[Factors]:
        # Read from the group: a wrapper that shards or moves the parameters replaces them there.
        ascent = self.param_groups[1]
        return list(map(Factors, ascent["params"][0::2], ascent["params"][1::2], ascent["scalings"]))


def _partners(model: PeftModel, params: list[Tensor], scalings: Sequence[float]) -> list[Partner | None]:
    """Of each layer where A1 and B1 are among `params`, and what their gradients are divided by to be the auxiliary's.

    None where they are not of the auxiliary's G.
    """
    places = adapter_places(model, params)
    ratios = [
        primary.scaling * scaling / auxiliary.scaling
        for primary, auxiliary, scaling in zip(primary_factors(model), auxiliary_factors(model), scalings, strict=True)
    ]
    partners = zip(places[0::2], places[1::2], ratios, strict=True)
    return [one if alike else None for one, alike in zip(partners, of_one_gradient(model), strict=True)]


def build(
    model: PeftModel,
    place: Place,
    *,
    auxiliary_rank: int,
    rho: float,
    auxiliary_learning_rate: float | None,
    clip: Clip,
    norm: Norm,
    ascent: Ascent,
    **descent: Unpack[Descent],
) -> BiLoraAdamW:
    """Bi-LoRA on the primary adapter and a new auxiliary. ValueError if the model has other than linear layers."""
    attach_auxiliary(model, auxiliary_rank)
    place(model)
    return BiLoraAdamW(
        model, rho=rho, auxiliary_learning_rate=auxiliary_learning_rate, clip=clip, norm=norm, ascent=ascent, **descent
    )
