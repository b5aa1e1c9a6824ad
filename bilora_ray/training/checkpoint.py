"""Exact, atomic checkpoints of all that training changes or stands on: adapters, optimizer, random states, counters.

The frozen base weights are never in one. A checkpoint gets its name only once it is complete on disk, so a reader
sees a whole one or none.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bilora_ray.errors import MachineError, first_line
from bilora_ray.files import atomic_folder
from bilora_ray.method.primaries import starts
from bilora_ray.training.distributed.parallel import collected, put
from bilora_ray.training.distributed.workers import ALONE, Workers, random_states, set_random_states
from bilora_ray.training.folder import STATE, TENSORS, TrialFolder

# Under these names a checkpoint keeps what the optimizer says its state is: of its parameters, and all else.
OPTIMIZER, METHOD = "optimizer", "method"
# And under this one what the factors of a primary were at first, of one that is a change since.
START = "start"
# The key of what stands for a tensor in JSON.
TENSOR = "tensor"


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
        optimizer: over those parameters. What its `state_dict` says is saved, in its own shapes and dtypes. What is not
            of a parameter in parts must be the same on all workers.
        state: JSON values that the caller gets back.
        workers: who train the model.

    Raises:
        TypeError: the optimizer's state holds what is neither a tensor nor a plain value.
        ValueError: the optimizer moves parameters that are not the model's.
    """
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable(model).items()}
    tensors |= {f"{START}.{name}": tensor for name, tensor in starts(model).items()}
    told = _take_apart(model, optimizer, tensors)
    tensors = collected(tensors, workers)
    for rank, generators in enumerate(workers.gather(random_states())):
        tensors.update({f"random.{rank}.{name}": generator for name, generator in generators.items()})
    if workers.is_first:
        with atomic_folder(path) as unfinished:
            # A method may keep a view of what it moves, and safetensors refuses two names for one memory.
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, unfinished / TENSORS)
            (unfinished / STATE).write_text(json.dumps({**state, OPTIMIZER: told}))
    workers.wait()


def load_checkpoint(
    folder: TrialFolder, model: nn.Module, optimizer: torch.optim.Optimizer, workers: Workers = ALONE
) -> dict[str, Any] | None:
    """Restore the newest checkpoint of `folder`, random states included; its state, or None if there is none.

    It need not have been written by as many workers; one that is new goes on with its own random state.

    Raises:
        FileNotFoundError: this worker does not see the checkpoint that the first one sees.
        MachineError: the checkpoint is torn, which it was not when it got its name.
        ValueError: the checkpoint belongs to another model or method.
    """
    newest = folder.latest()
    if newest is not None and not (newest / TENSORS).exists():
        newest = None
    # Over a network a worker may be shown an older folder than another: all go on from what the first one sees.
    newest = workers.gather(newest)[0]
    if newest is None:
        return None
    try:
        tensors = load_file(newest / TENSORS)
    except SafetensorError as error:
        raise MachineError(f"{newest / TENSORS}: cannot be read ({first_line(error)})") from None
    saved = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    parameters = trainable(model)
    # Without the shapes copy_ would spread a rank of 1 over any other.
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{newest} holds other parameters than this trial trains")
    began = _under(f"{START}.", tensors)
    if began.keys() != starts(model).keys():
        raise ValueError(f"{newest} holds another primary than this trial trains")
    for name, tensor in starts(model).items():
        put(tensor, began[name])
    for name, parameter in parameters.items():
        put(parameter, saved[name])
    state = json.loads((newest / STATE).read_text())
    _put_together(model, optimizer, state.pop(OPTIMIZER, {}), tensors)
    set_random_states(_under(f"random.{workers.rank}.", tensors))
    return state


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, tuple[str, nn.Parameter]]:
    """The optimizer's parameters, with their names in `model`, by the numbers that its `state_dict` gives them."""
    names = {parameter: name for name, parameter in trainable(model).items()}
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not names.keys() >= set(moved):
        raise ValueError("the optimizer moves parameters that are not trainable ones of the model")
    return {number: (names[parameter], parameter) for number, parameter in enumerate(dict.fromkeys(moved))}


def _take_apart(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> Any:
    """What the optimizer says its state is, as JSON holds it. The tensors in it are added to `tensors`.

    A parameter's own are there by the parameter's name and their key; the others stand for themselves in the JSON.
    """
    told = optimizer.state_dict()
    told["param_groups"] = [_without(group, {"params"}) for group in told["param_groups"]]
    for number, (name, _) in _named(model, optimizer).items():
        own = told["state"].pop(number, {})
        direct = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        tensors.update({f"{OPTIMIZER}.{name}.{key}": value for key, value in direct.items()})
        if direct.keys() != own.keys():
            told["state"][name] = _without(own, direct)
    return _plain(told, METHOD, tensors)


def _put_together(
    model: nn.Module, optimizer: torch.optim.Optimizer, told: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Give the optimizer back what `_take_apart` made of its state.

    A checkpoint of 0.1.0 has only the tensors of the parameters: what is not in it stays as it was made.
    """
    told = _full(told, tensors)
    told.setdefault("state", {})
    saved: dict[Tensor, dict[str, Any]] = {}
    for name, parameter in _named(model, optimizer).values():
        own = {**told["state"].pop(name, {}), **_under(f"{OPTIMIZER}.{name}.", tensors)}
        saved[parameter] = {key: _beside(parameter, key, value) for key, value in own.items()}
    groups = optimizer.state_dict()["param_groups"]
    kept = told.get("param_groups", groups)
    told["param_groups"] = [{**now, **_typed(group, now)} for now, group in zip(groups, kept, strict=True)]
    optimizer.load_state_dict(told)
    # Past torch, which would give each tensor its parameter's dtype.
    optimizer.state.update(saved)


def _beside(parameter: nn.Parameter, key: str, value: Any) -> Any:
    """A value of a parameter's state where torch has it: on its device, and cut as it is if it has its shape."""
    if not isinstance(value, Tensor):
        return value
    # Everything is copied out of the file's memory: the file will be removed.
    if key == "step":  # AdamW counts on the CPU, and torch leaves that there
        return value.clone()
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    beside = torch.zeros_like(parameter, dtype=value.dtype)
    put(beside, value)
    return beside


def _typed(values: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    """`values` from JSON, which knows no tuples."""
    return {key: tuple(value) if isinstance(examples.get(key), tuple) else value for key, value in values.items()}


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON holds it, with the names in place of its tensors, which are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{name}.{number}", tensors) for number, part in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint keeps tensors and plain values")


def _full(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_plain` was given, with lists for tuples."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]].clone()
        return {key: _full(part, tensors) for key, part in value.items()}
    return [_full(part, tensors) for part in value] if isinstance(value, list) else value


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _without(mapping: dict[str, Any], keys: Container[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
