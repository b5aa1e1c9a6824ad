"""Exact, atomic checkpoints of all that training changes: adapters, optimizer, random states, counters.

The frozen base weights are never in one. A checkpoint is a folder `step-00000120` that holds `tensors.safetensors`
and `state.json`; it gets its name only once it is complete on disk, so a reader sees a whole one or none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "state.json"
TENSORS = "tensors.safetensors"
COMPLETE = re.compile(r"step-(\d{8})")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: both adapters and any modules_to_save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write the checkpoint of `step` into `folder`, then remove the older ones.

    Args:
        folder: where checkpoints live; made if missing.
        step: optimizer steps done.
        model: its trainable parameters are saved.
        optimizer: an AdamW over those parameters.
        state: JSON values that the caller gets back.
    """
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable(model).items()}
    tensors.update(_optimizer_tensors(model, optimizer))
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    with atomic_folder(folder / f"step-{step:08d}") as unfinished:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished / TENSORS)
        (unfinished / STATE).write_text(json.dumps({"step": step, **state}))
    for old in _complete(folder)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest checkpoint of `folder`, random states included; its state, or None if there is none.

    Raises:
        ValueError: the checkpoint belongs to another model or method.
    """
    newest = latest(folder)
    if newest is None or not (newest / TENSORS).exists():
        return None
    tensors = load_file(newest / TENSORS)
    saved = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    parameters = trainable(model)
    if saved.keys() != parameters.keys():
        raise ValueError(f"{newest} holds other parameters than this trial trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    _restore_optimizer(model, optimizer, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return read_state(folder)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of `folder`."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def read_state(folder: Path) -> dict[str, Any] | None:
    """The counters and evaluations of the newest checkpoint, without its tensors."""
    newest = latest(folder)
    return None if newest is None else json.loads((newest / STATE).read_text())


def discard_tensors(folder: Path) -> None:
    """Free the disk of a trial that will not go on; its counters and evaluations stay readable."""
    for checkpoint in _complete(folder):
        (checkpoint / TENSORS).unlink(missing_ok=True)


class atomic_folder:  # noqa: N801 - reads as a statement
    """`with atomic_folder(path) as unfinished:` fill `unfinished`; it becomes `path` at the end, or vanishes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True)
        return self.unfinished

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            return
        for file in self.unfinished.rglob("*"):
            _sync(file)
        shutil.rmtree(self.path, ignore_errors=True)
        self.unfinished.rename(self.path)
        _sync(self.path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if COMPLETE.fullmatch(path.name))


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
