"""Methods by name: a method is one file, and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from bilora_ray.errors import nearest
from bilora_ray.method import bar, bilora, dual_lora, esam, flat_lora, full, looksam, lora, lora_sam, rwp
from bilora_ray.method.base import Descent, MethodAdamW, Place

# A method's name -> what makes its optimizer for a PEFT LoRA model with the primary adapter, to which it attaches what
# the method needs; `full` takes a model without one. The arguments are the model, a `Place` to call once all parameters
# are there, and by keyword each setting that the method reads, under its name in `TrialConfig`; `**descent` are those
# of `Descent`.
METHODS: dict[str, Callable[..., MethodAdamW]] = {
    "lora": lora.build,
    "bilora": bilora.build,
    "dual-lora": dual_lora.build,
    "lora-sam": lora_sam.build,
    "looksam": looksam.build,
    "esam": esam.build,
    "nbar": bar.build_nbar,
    "obar": bar.build_obar,
    "flat-lora": flat_lora.build,
    "rwp": rwp.build,
    "full": full.build,
}


def settings_of(name: str) -> tuple[str, ...]:
    """The settings that method `name` reads."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    own = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    shared = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return (*own, *Descent.__annotations__) if shared else own


def stay(model: nn.Module) -> None:
    """Leave the parameters where they are."""


def build_method(name: str, model: nn.Module, place: Place = stay, **settings: Any) -> MethodAdamW:
    """The optimizer of method `name` for `model`, to which it attaches what the method needs.

    Args:
        name: one of `METHODS`.
        model: a PEFT LoRA model with its primary adapter; of `full` one without.
        place: moves or shards the parameters (FSDP makes new ones), once all of them are there and before the
            optimizer takes them.
        settings: those that the method reads, every one of them: `settings_of(name)`.

    Raises:
        ValueError: there is no such method, or it can't train this model.
        TypeError: a setting is missing, or the method does not read it.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}'; {nearest(name, METHODS)}")
    read = settings_of(name)
    missing = [setting for setting in read if setting not in settings]
    if missing:
        raise TypeError(f"method '{name}' needs {', '.join(missing)}")
    for unknown in sorted(settings.keys() - set(read)):
        raise TypeError(f"method '{name}' does not read {unknown}; {nearest(unknown, read)}")
    return METHODS[name](model, place, **settings)
