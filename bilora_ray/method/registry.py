"""Methods by name: from settings to the optimizer that trains a model with that method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from bilora_ray.errors import nearest
from bilora_ray.method.adapters import attach_auxiliary
from bilora_ray.method.optimizer import BiLoraAdamW, LoraAdamW, MethodAdamW

Place = Callable[[PeftModel], None]


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The settings of all methods; each reads its part.

    Attributes:
        learning_rate: lr of the primary and all else that descends.
        weight_decay: AdamW's, of the descent.
        max_grad_norm: limit on the gradient's norm, for each branch by itself; None for no limit.
        rho: radius of the auxiliary perturbation s2 B2 A2, Frobenius norm over all layers.
        auxiliary_rank: r2.
        auxiliary_learning_rate: lr2.
    """

    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    rho: float
    auxiliary_rank: int
    auxiliary_learning_rate: float


def _keep(model: PeftModel) -> None:
    """Leave the parameters where they are."""


def _lora(model: PeftModel, settings: MethodSettings, place: Place) -> LoraAdamW:
    place(model)
    return LoraAdamW(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


def _bilora(model: PeftModel, settings: MethodSettings, place: Place) -> BiLoraAdamW:
    attach_auxiliary(model, settings.auxiliary_rank)
    place(model)
    return BiLoraAdamW(
        model,
        learning_rate=settings.learning_rate,
        rho=settings.rho,
        auxiliary_learning_rate=settings.auxiliary_learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


METHODS: dict[str, Callable[[PeftModel, MethodSettings, Place], MethodAdamW]] = {"lora": _lora, "bilora": _bilora}


def build_method(name: str, model: PeftModel, place: Place = _keep, **settings: Any) -> MethodAdamW:
    """The optimizer of method `name` for `model`, to which it attaches what the method needs.

    Args:
        name: one of `METHODS`.
        model: a PEFT LoRA model with its primary adapter.
        place: moves or shards the parameters (FSDP makes new ones), once all of them are there and before the
            optimizer takes them.
        settings: the attributes of `MethodSettings`, every one of them.

    Raises:
        ValueError: there is no such method, or it can't train this model.
        TypeError: a setting is missing or unknown.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}'; {nearest(name, METHODS)}")
    return METHODS[name](model, MethodSettings(**settings), place)
