"""Methods by name: a method is one file, and one line here."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from bilora_ray.errors import nearest
from bilora_ray.method import bilora, lora
from bilora_ray.method.base import Method, MethodAdamW, Place

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "bilora": bilora.METHOD,
}


def _keep(model: PeftModel) -> None:
    """Leave the parameters where they are."""


def build_method(name: str, model: PeftModel, place: Place = _keep, **settings: Any) -> MethodAdamW:
    """The optimizer of method `name` for `model`, to which it attaches what the method needs.

    Args:
        name: one of `METHODS`.
        model: a PEFT LoRA model with its primary adapter.
        place: moves or shards the parameters (FSDP makes new ones), once all of them are there and before the
            optimizer takes them.
        settings: those that the method reads, every one of them: `METHODS[name].settings`.

    Raises:
        ValueError: there is no such method, or it can't train this model.
        TypeError: a setting is missing, or the method does not read it.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}'; {nearest(name, METHODS)}")
    return METHODS[name].build(model, place, **settings)
