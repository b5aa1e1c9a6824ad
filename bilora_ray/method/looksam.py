"""LookSAM: the sharpness-aware gradient is computed now and then, and its own part reused (Liu et al., CVPR 2022)."""

from __future__ import annotations

from typing import Unpack

import torch
from peft import PeftModel
from torch import Tensor

from bilora_ray.method.adapters import fuse
from bilora_ray.method.base import Closure, Descent, Place, evaluated
from bilora_ray.method.flat import with_gradients
from bilora_ray.method.lora_sam import TINY, LoraSamAdamW

# Under this name the state of a parameter has its share of what SAM's gradient adds to the plain one.
BESIDE = "beside"


class LookSamAdamW(LoraSamAdamW):
    """LookSAM (arXiv 2203.02714): each `looksam_every`-th step is LoRA-SAM's, and the others reuse its direction.

    Of SAM's gradient g_s it keeps the part that is orthogonal to the plain one, g_v = g_s - (g_s . g / ||g||^2) g, over
    all parameters together. A step without SAM takes g + alpha ||g|| / ||g_v|| g_v. The first step is one of SAM.

    Args:
        model: a PEFT LoRA model without an auxiliary.
        rho: as LoRA-SAM's.
        looksam_every: k, >= 1: so many steps have one of two passes among them.
        looksam_alpha: how much of the reused direction a step has, > 0.
        descent: as `LoraAdamW`'s.

    Raises:
        ValueError: as `LoraSamAdamW`, or looksam_every or looksam_alpha is too small.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        rho: float,
        looksam_every: int = 5,
        looksam_alpha: float = 0.7,
        **descent: Unpack[Descent],
    ) -> None:
        if looksam_every < 1 or not looksam_alpha > 0:
            raise ValueError(f"looksam_every must be >= 1, looksam_alpha > 0, got {looksam_every}, {looksam_alpha}")
        super().__init__(model, rho=rho, **descent)
        self._found: list[tuple[Tensor, Tensor]] = []
        self.param_groups[0].update(looksam_every=looksam_every, looksam_alpha=looksam_alpha, looked=0)

    @property
    def passes_per_step(self) -> float:  # type: ignore[override]
        """One, and one more in each `looksam_every`-th step."""
        return 1 + 1 / float(self.param_groups[0]["looksam_every"])

    @property
    def steps_per_cycle(self) -> int:  # type: ignore[override]
        """`looksam_every`: one of SAM, and those that reuse it."""
        return int(self.param_groups[0]["looksam_every"])

    def _gradients(self, closure: Closure | None) -> Tensor | None:
        if closure is None:
            raise TypeError("sharpness-aware minimization asks for the loss twice in some steps: step(closure)")
        group = self.param_groups[0]
        due = group["looked"] % group["looksam_every"] == 0
        group["looked"] += 1
        loss = evaluated(closure)
        moving, gradients = with_gradients(group["params"])
        if due:
            with self._uphill():
                evaluated(closure)
            self._keep(moving, gradients)
        else:
            self._reuse(moving, gradients)
        return loss

    def _keep(self, moving: list[Tensor], plain: list[Tensor]) -> None:
        """Remember what the gradients that the parameters have now, SAM's, have beside the `plain` ones.

        Of an expert without tokens there is none in some passes: that counts as 0.
        """
        before = dict(zip(moving, plain, strict=True))
        there, sharp = with_gradients(self.param_groups[0]["params"])
        own = [before[each] if each in before else torch.zeros_like(each) for each in there]
        along = _dot(sharp, own) / (_dot(plain, plain) + TINY)
        beside = torch._foreach_sub(sharp, list(torch._foreach_mul(own, along)))
        for state in self.state.values():
            state.pop(BESIDE, None)
        self._found = list(zip(there, beside, strict=True))

    def _after_update(self) -> None:
        # Not before: AdamW begins the state of a parameter only where there is none.
        for parameter, part in self._found:
            self.state[parameter][BESIDE] = part
        self._found = []

    def _reuse(self, moving: list[Tensor], gradients: list[Tensor]) -> None:
        kept = [self.state.get(parameter, {}).get(BESIDE) for parameter in moving]
        changed = [gradient for gradient, part in zip(gradients, kept, strict=True) if part is not None]
        beside = [part for part in kept if part is not None]
        if beside:
            alpha = self.param_groups[0]["looksam_alpha"]
            scale = alpha * (_dot(gradients, gradients) / (_dot(beside, beside) + TINY)).sqrt()
            torch._foreach_add_(changed, torch._foreach_mul(beside, scale))


def _dot(ones: list[Tensor], others: list[Tensor]) -> Tensor:
    """The inner product of all of `ones` with all of `others`."""
    return torch.stack([product.sum() for product in torch._foreach_mul(ones, others)]).sum()


def build(
    model: PeftModel, place: Place, *, rho: float, looksam_every: int, looksam_alpha: float, **descent: Unpack[Descent]
) -> LookSamAdamW:
    """LookSAM on the primary adapter. ValueError if there is nothing to train."""
    fuse(model)
    place(model)
    return LookSamAdamW(model, rho=rho, looksam_every=looksam_every, looksam_alpha=looksam_alpha, **descent)
