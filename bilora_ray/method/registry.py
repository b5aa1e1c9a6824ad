"""Methods by name: from settings to the optimizer that trains a model with that method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel

from bilora_ray.errors import nearest
from bilora_ray.method import bilora, lora
from bilora_ray.method.base import MethodAdamW, MethodSettings, Place


def _keep(model: PeftModel) -> None:
    """Leave the parameters where they are."""


METHODS: dict[str, Callable[[PeftModel, MethodSettings, Place], MethodAdamW]] = {
    "lora": lora.build,
    "bilora": bilora.build,
}


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
