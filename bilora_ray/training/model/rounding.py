"""In which dtype the parts of a base model compute that are trained, or read images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.recipe import is_whole
from bilora_ray.training.compute.precision import dtype_of
from bilora_ray.training.model.files import source


def reread(model: PreTrainedModel, config: TrialConfig, modules: Sequence[str]) -> None:
    """Give the `modules`, which compute in fp32, the weights of a model that was trained here as its files have them.

    transformers has rounded those of all modules to one dtype.
    """
    folder = Path(source(config))
    if dtype_of(config) == torch.float32 or not folder.is_dir() or not is_whole(folder):
        return
    prefixes = tuple(f"{name}." for name in modules)
    parameters = {name: one for name, one in model.named_parameters() if name.startswith(prefixes)}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for name in parameters.keys() & set(tensors.keys()):
                parameters[name].copy_(tensors.get_tensor(name))


def round_images(model: nn.Module, dtype: torch.dtype, but: Sequence[str]) -> None:
    """Have the parts of `model`, less the modules `but`, read images as `dtype`: some would refuse float32."""

    def rounded(value: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(rounded, inputs)), {key: rounded(value) for key, value in named.items()}

    for name, part in model.named_children():
        if name not in but:
            part.register_forward_pre_hook(enter, with_kwargs=True)


def keep_statistics(model: nn.Module) -> None:
    """Have batch normalisation use the base's statistics in training too: an adapter does not hold those of its own."""

    def freeze(module: nn.Module, _: tuple[Any, ...]) -> None:
        module.eval()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.register_forward_pre_hook(freeze)


def keep_fp32(module: nn.Module, amid: bool) -> None:
    """Have `module`, which is trained, compute in fp32 beside others that don't: in bf16 AdamW's moments would stall.

    Args:
        module: it.
        amid: whether others read what it computes. What a head does, the loss reads, in fp32.
    """
    outer = next(module.parameters()).dtype

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    def leave(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(outer) if torch.is_tensor(output) else output

    if outer != torch.float32:
        module.float()
        module.register_forward_pre_hook(enter)
        if amid:
            module.register_forward_hook(leave)
