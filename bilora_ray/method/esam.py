"""ESAM: LoRA-SAM of some of the factors, and of the rows that matter (Du et al., ICLR 2022, arXiv 2110.03141)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Unpack

import torch
from peft import PeftModel
from torch import Tensor

from bilora_ray.method.adapters import fuse
from bilora_ray.method.base import Closure, Descent, Place, RowClosure
from bilora_ray.method.flat import with_gradients
from bilora_ray.method.lora_sam import TINY, LoraSamAdamW
from bilora_ray.method.radius import own_part


class EsamAdamW(LoraSamAdamW):
    """ESAM on A1 and B1: stochastic weight perturbation, and sharpness-sensitive data selection.

    Each factor is perturbed with probability beta, those together by rho / beta up their gradient, as in the authors'
    code; the second gradient is of the share gamma of the rows whose part of the loss rose most by that.

    Its authors save the gradients of weights that are not perturbed. Of an adapter those are next to nothing, and the
    look at all rows under the perturbation costs a forward pass: a step takes somewhat longer than LoRA-SAM's. Rows are
    told apart by a pass for each.

    Args:
        model: a PEFT LoRA model without an auxiliary.
        rho: as LoRA-SAM's.
        esam_beta: share of the factors, in (0, 1].
        esam_gamma: share of the rows, in (0, 1]; one row at the least.
        seed: of the choice of factors, with the step.
        descent: as `LoraAdamW`'s.

    Raises:
        ValueError: as `LoraSamAdamW`, or esam_beta or esam_gamma is no such share.
    """

    forward_passes_per_step = 1.0

    def __init__(
        self,
        model: PeftModel,
        *,
        rho: float,
        esam_beta: float = 0.5,
        esam_gamma: float = 0.5,
        seed: int = 0,
        **descent: Unpack[Descent],
    ) -> None:
        if not (0 < esam_beta <= 1 and 0 < esam_gamma <= 1):
            raise ValueError(f"esam_beta and esam_gamma must be in (0, 1], got {esam_beta}, {esam_gamma}")
        super().__init__(model, rho=rho, **descent)
        self._seed = seed
        self.param_groups[0].update(esam_beta=esam_beta, esam_gamma=esam_gamma, begun=0)

    @property
    def passes_per_step(self) -> float:  # type: ignore[override]
        """One, and one of `esam_gamma` of the rows."""
        return 1 + float(self.param_groups[0]["esam_gamma"])

    def _gradients(self, closure: Closure | None) -> Tensor | None:
        """TypeError if the closure cannot tell rows apart."""
        if not isinstance(closure, RowClosure):
            raise TypeError("ESAM looks at the loss of each row: step(closure), with a closure that has by_row")
        group = self.param_groups[0]
        with torch.enable_grad():
            before = closure.by_row()
        with self._uphill():
            rise = closure.by_row(gradient=False) - before
            count = max(1, int(len(rise) * group["esam_gamma"]))
            # Stable: where nothing was chosen no row rises, and all workers must take the same ones.
            sharpest = rise.argsort(descending=True, stable=True)[:count].tolist()
            with torch.enable_grad():
                closure.by_row(sorted(sharpest))
        group["begun"] += 1
        return before.sum()

    def next_perturbed(self) -> tuple[float, list[bool]]:
        """rho / beta, and those of the factors that the draw of this step has chosen."""
        group = self.param_groups[0]
        chosen = perturbed(self._seed, group["begun"], len(group["factors"]), group["esam_beta"])
        return group["rho"] / group["esam_beta"], chosen

    @contextmanager
    def _uphill(self) -> Iterator[None]:
        """In it the chosen factors are rho / beta up their gradient; after it they are what they were, to the bit."""
        group = self.param_groups[0]
        radius, chosen = self.next_perturbed()
        places = [place for place, is_chosen in zip(group["factors"], chosen, strict=True) if is_chosen]
        moved, gradients = with_gradients(group["params"][place] for place in places)
        before = [parameter.detach().clone() for parameter in moved]
        if moved:
            scale = radius / (torch.nn.utils.get_total_norm(gradients) + TINY)
            torch._foreach_add_(moved, torch._foreach_mul(gradients, scale))
        try:
            yield
        finally:
            if moved:
                torch._foreach_copy_(list(map(own_part, moved)), list(map(own_part, before)))


def perturbed(seed: int, step: int, count: int, share: float) -> list[bool]:
    """Which of `count` factors are perturbed in `step`: each with probability `share`, the same on all workers."""
    draws = Random(f"{seed} {step}")
    return [draws.random() < share for _ in range(count)]


def build(
    model: PeftModel,
    place: Place,
    *,
    rho: float,
    esam_beta: float,
    esam_gamma: float,
    seed: int,
    **descent: Unpack[Descent],
) -> EsamAdamW:
    """ESAM on the primary adapter. ValueError if there is nothing to train."""
    fuse(model)
    place(model)
    return EsamAdamW(model, rho=rho, esam_beta=esam_beta, esam_gamma=esam_gamma, seed=seed, **descent)
