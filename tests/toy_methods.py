"""Toy methods: some remember something from one step to the next, of every kind; one asks for the loss twice a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bilora_ray.config import TrialConfig
from bilora_ray.method import LoraAdamW
from bilora_ray.method.base import Closure, Place
from bilora_ray.training import model as models


class Remembering(LoraAdamW):
    """Plain LoRA whose parameters shrink after each update by what the `kind` of memory says."""

    def __init__(self, model: nn.Module, kind: str, learning_rate: float) -> None:
        super().__init__(model, learning_rate=learning_rate)
        self.kind = kind
        self.generator = torch.Generator().manual_seed(1)
        self.counted = 0

    def _after_update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - 0.01 * MEMORIES[self.kind](self, group, parameter))

    def state_dict(self) -> dict[str, Any]:
        more = {"generator": self.generator.get_state(), "counted": {"all": [self.counted]}}
        return {**super().state_dict(), **more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])
        self.counted = state_dict["counted"]["all"][0]
        super().load_state_dict(state_dict)


def _in_state(start: Any, grow: Callable[[Any], Any]) -> Callable[..., float]:
    def remember(optimizer: Remembering, _: dict[str, Any], parameter: nn.Parameter) -> float:
        state = optimizer.state[parameter]
        state["memory"] = grow(state.get("memory", start))
        return float(torch.as_tensor(state["memory"]).double().mean())

    return remember


def _in_group(start: Any, grow: Callable[[Any], Any]) -> Callable[..., float]:
    def remember(_: Remembering, group: dict[str, Any], __: nn.Parameter) -> float:
        group["memory"] = grow(group.get("memory", start))
        return float(torch.as_tensor(group["memory"]).double().mean())

    return remember


def _rows(optimizer: Remembering, _: dict[str, Any], parameter: nn.Parameter) -> float:
    memory = optimizer.state[parameter].setdefault("memory", torch.zeros(len(parameter), 2))
    return float(memory.add_(torch.arange(len(memory))[:, None] / 10).mean())


def _whole(optimizer: Remembering, _: dict[str, Any], parameter: nn.Parameter) -> float:
    memory = optimizer.state[parameter].setdefault("memory", torch.zeros_like(parameter, dtype=torch.float64))
    return float(memory.add_(parameter.double() + 1e-9).abs().sum()) / 100


def _shared(optimizer: Remembering, _: dict[str, Any], __: nn.Parameter) -> float:
    memory = optimizer.state["shared"].setdefault("memory", torch.zeros(3, dtype=torch.float64))
    return float(memory.add_(1 / 700).sum())


def _drawn(optimizer: Remembering, _: dict[str, Any], __: nn.Parameter) -> float:
    return float(torch.rand((), generator=optimizer.generator))


def _own(optimizer: Remembering, _: dict[str, Any], __: nn.Parameter) -> float:
    optimizer.counted += 1
    return optimizer.counted / 1000


MEMORIES: dict[str, Callable[..., float]] = {
    "counter in a group": _in_group(0, lambda count: count + 1),
    "schedule in a group": _in_group(1.0, lambda rho: rho * 0.95),
    "flag in a group": _in_group(False, lambda flag: not flag),
    "list in a group": _in_group([0.1, 0.7], lambda numbers: [number + 1 / 300 for number in numbers]),
    "tensor in a group": _in_group(torch.zeros((), dtype=torch.float64), lambda rho: rho + 1 / 300),
    "scalar tensor": _in_state(torch.zeros((), dtype=torch.float64), lambda scale: scale + 1 / 3),
    "integer tensor": _in_state(torch.zeros((), dtype=torch.int64), lambda hits: hits + 1),
    "number": _in_state(0.0, lambda average: average + 1 / 3),
    "list of numbers": _in_state([0, 1], lambda pair: [pair[1], pair[0] + 1]),
    "buffer of another shape": _rows,
    "buffer of another dtype": _whole,
    "buffer of all": _shared,
    "generator": _drawn,
    "number of all": _own,
}


class TwoPasses(LoraAdamW):
    """Takes the gradient of plain LoRA at the weights moved by `rho` along it, as sharpness-aware methods do.

    Attributes:
        losses: of both passes of each step.
    """

    def __init__(self, model: nn.Module, learning_rate: float, rho: float) -> None:
        super().__init__(model, learning_rate=learning_rate, max_grad_norm=1.0)
        self.rho = rho
        self.losses: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            first = closure()
        moves = {parameter: self.rho * parameter.grad for parameter in self.param_groups[0]["params"]}
        for parameter, move in moves.items():
            parameter.add_(move)
        with torch.enable_grad():
            second = closure()
        for parameter, move in moves.items():
            parameter.sub_(move)
        self.losses.append((first, second))
        super().step()
        return second


def pass_twice(rho: float) -> None:
    """Let every method be `TwoPasses` from now on in this process."""
    models.build_optimizer = partial(_build_twice, rho)


def _build_twice(rho: float, model: PeftModel, config: TrialConfig, place: Place) -> TwoPasses:
    place(model)
    return TwoPasses(model, config.learning_rate, rho)


def remember(kind: str) -> None:
    """Let every method be the toy from now on in this process."""
    models.build_optimizer = partial(_build, kind)


def _build(kind: str, model: PeftModel, config: TrialConfig, place: Place) -> Remembering:
    place(model)
    return Remembering(model, kind, config.learning_rate)
