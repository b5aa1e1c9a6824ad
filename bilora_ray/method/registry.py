"""Methods by name: from settings to the optimizer that trains a model with that method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftModel

from bilora_ray.errors import nearest
from bilora_ray.method.adapters import attach_auxiliary
from bilora_ray.method.optimizer import BiLoraAdamW, LoraAdamW, MethodAdamW


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What methods read; each reads its part. See `TrialConfig` for what they mean."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    rho: float
    auxiliary_rank: int
    auxiliary_learning_rate: float


def _lora(model: PeftModel, settings: MethodSettings) -> LoraAdamW:
    return LoraAdamW(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


def _bilora(model: PeftModel, settings: MethodSettings) -> BiLoraAdamW:
    attach_auxiliary(model, settings.auxiliary_rank)
    return BiLoraAdamW(
        model,
        learning_rate=settings.learning_rate,
        rho=settings.rho,
        auxiliary_learning_rate=settings.auxiliary_learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


METHODS: dict[str, Callable[[PeftModel, MethodSettings], MethodAdamW]] = {"lora": _lora, "bilora": _bilora}


def build_method(
    name: str,
    model: PeftModel,
    *,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float | None,
    rho: float,
    auxiliary_rank: int,
    auxiliary_learning_rate: float,
) -> MethodAdamW:
    """The optimizer of method `name` for `model`, to which it attaches what the method needs.

    Args:
        name: one of `METHODS`.
        model: a PEFT model with its primary adapter.
        learning_rate, weight_decay, max_grad_norm: of the descent; the limit holds for each branch.
        rho, auxiliary_rank, auxiliary_learning_rate: of the auxiliary; methods without one don't read them.

    Raises:
        ValueError: there is no such method, or it can't train this model.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}'; {nearest(name, METHODS)}")
    settings = MethodSettings(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        rho=rho,
        auxiliary_rank=auxiliary_rank,
        auxiliary_learning_rate=auxiliary_learning_rate,
    )
    return METHODS[name](model, settings)
