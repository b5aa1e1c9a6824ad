"""Exact, atomic checkpoints of all that training changes: adapters, optimizer, random states, counters.

The frozen base weights are never in one. A checkpoint gets its name only once it is complete on disk, so a reader
sees a whole one or none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bilora_ray.files import atomic_folder
from bilora_ray.training.distributed.parallel import put, whole
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.folder import STATE, TENSORS, TrialFolder


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: both adapters and any modules_to_save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], workers: Workers = ALONE
) -> None:
    """Write a checkpoint. All workers call it, the first one writes, and all go on once it is there.

    Args:
        path: the checkpoint's folder.
        model: its trainable parameters are saved.
        optimizer: an AdamW over those parameters.
        state: JSON values that the caller gets back.
        workers: who train the model.
    """
    tensors = {f"model.{name}": whole(parameter.detach()) for name, parameter in trainable(model).items()}
    tensors.update(_optimizer_tensors(model, optimizer))
    for rank, generators in enumerate(workers.gather(_random_states())):
        tensors.update({f"random.{rank}.{name}": generator for name, generator in generators.items()})
    if workers.is_first:
        with atomic_folder(path) as unfinished:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished / TENSORS)
            (unfinished / STATE).write_text(json.dumps(state))
    workers.wait()


def load_checkpoint(
    folder: TrialFolder, model: nn.Module, optimizer: torch.optim.Optimizer, workers: Workers = ALONE
) -> dict[str, Any] | None:
    """Restore the newest checkpoint of `folder`, random states included; its state, or None if there is none.

    It need not have been written by as many workers; one that is new goes on with its own random state.

    Raises:
        FileNotFoundError: this worker does not see the checkpoint that the first one sees.
        ValueError: the checkpoint belongs to another model or method.
    """
    newest = folder.latest()
    if newest is not None and not (newest / TENSORS).exists():
        newest = None
    # Over a network a worker may be shown an older folder than another: all go on from what the first one sees.
    newest = workers.gather(newest)[0]
    if newest is None:
        return None
    tensors = load_file(newest / TENSORS)
    saved = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    parameters = trainable(model)
    # Without the shapes copy_ would spread a rank of 1 over any other.
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{newest} holds other parameters than this trial trains")
    for name, parameter in parameters.items():
        put(parameter, saved[name])
    _restore_optimizer(model, optimizer, tensors)
    own = f"random.{workers.rank}."
    _restore_random({name.removeprefix(own): state for name, state in tensors.items() if name.startswith(own)})
    return json.loads((newest / STATE).read_text())


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: dict[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": whole(value)
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trainable(model).items():
        prefix = f"optimizer.{name}."
        saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps its step counter on the CPU and the moments beside the parameter, in the same parts.
        state = {key: value if key == "step" else torch.zeros_like(parameter) for key, value in saved.items()}
        for key in saved.keys() - {"step"}:
            put(state[key], saved[key])
        optimizer.state[parameter] = state
