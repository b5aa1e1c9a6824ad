"""Exact, atomic checkpoints of all that training changes: adapters, optimizer, random states, counters.

The frozen base weights are never in one. A checkpoint gets its name only once it is complete on disk, so a reader
sees a whole one or none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bilora_ray.training.folder import STATE, TENSORS, TrialFolder


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: both adapters and any modules_to_save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: the checkpoint's folder.
        model: its trainable parameters are saved.
        optimizer: an AdamW over those parameters.
        state: JSON values that the caller gets back.
    """
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable(model).items()}
    tensors.update(_optimizer_tensors(model, optimizer))
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    with atomic_folder(path) as unfinished:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished / TENSORS)
        (unfinished / STATE).write_text(json.dumps(state))


def load_checkpoint(folder: TrialFolder, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest checkpoint of `folder`, random states included; its state, or None if there is none.

    Raises:
        ValueError: the checkpoint belongs to another model or method.
    """
    newest = folder.latest()
    if newest is None or not (newest / TENSORS).exists():
        return None
    tensors = load_file(newest / TENSORS)
    saved = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    parameters = trainable(model)
    # Without the shapes copy_ would spread a rank of 1 over any other.
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{newest} holds other parameters than this trial trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    _restore_optimizer(model, optimizer, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return folder.state()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends and vanishes if it raises."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path_inside in (*unfinished.rglob("*"), unfinished):
            _sync(path_inside)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        _sync(path.parent)
    except BaseException:  # Ctrl-C and a stopped trial too: nothing half-written stays, and all is raised again
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trainable(model).items():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps its step counter on the CPU and the moments beside the parameter.
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
        }
