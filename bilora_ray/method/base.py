"""What all methods share: AdamW whose step evaluates the loss.

Every method is an optimizer with the same seam: a training loop calls `optimizer.step(closure)` and nothing else, so
that a method which needs the loss twice a step fits the same loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from peft import PeftModel
from torch import Tensor, nn

from bilora_ray.method.adapters import primary_factors, primary_parameters
from bilora_ray.method.flat import UNUSUAL, Plan, alike, with_gradients

Closure = Callable[[], Tensor]
Place = Callable[[Any], None]


@runtime_checkable
class RowClosure(Protocol):
    """A closure that can tell the rows of a step apart."""

    def __call__(self) -> Tensor:
        """See `MethodAdamW.step`."""

    def by_row(self, rows: Sequence[int] | None = None, gradient: bool = True) -> Tensor:
        """What each row has in the mean loss, without its graph.

        Args:
            rows: their places among those of the step; all of them if None. The mean is over these alone.
            gradient: whether the gradients are cleared, and that of the mean is left.

        Returns:
            (rows,): they add up to the mean loss.
        """


class Descent(TypedDict):
    """The settings of AdamW that all methods share. `build_method` asks for all of them.

    Attributes:
        learning_rate: lr.
        weight_decay: decoupled. Who makes an optimizer by its class may leave it out: 0.
        max_grad_norm: limit on the gradient's norm, applied inside `step`; None: none. It may be left out there too.
    """

    learning_rate: float
    weight_decay: NotRequired[float]
    max_grad_norm: NotRequired[float | None]


class MethodAdamW(torch.optim.AdamW):
    """What the methods share: AdamW whose step evaluates the loss, limits each group's gradient, and updates.

    A group holds `max_grad_norm` besides AdamW's own settings.

    What a method remembers from one step to the next is in its groups, in `state`, or added to what `state_dict` says:
    that is what a checkpoint keeps, tensors and plain values, each in its own shape and dtype; a tuple in `state` comes
    back as a list. AdamW begins the state of a parameter at its first update, and only if there is none yet.
    """

    # How many forward and backward passes over the rows a step takes, on average.
    passes_per_step: float = 1.0
    # After how many steps they are as many again: steps may differ.
    steps_per_cycle: int = 1
    # How many forward passes it takes beside those.
    forward_passes_per_step: float = 0.0
    # How many steps the training has; None if nobody has said so. It is told anew at each start.
    total_steps: int | None = None

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self._plans: dict[int, Plan] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from the gradients that `closure`, or the caller before, has left.

        Args:
            closure: clears the gradients, runs forward and backward, and returns the loss. As in torch, optional.

        Returns:
            What `closure` returned.
        """
        loss = self._gradients(closure)
        self._before_update()
        self._update()
        self._after_update()
        return loss

    def metrics(self) -> dict[str, float]:
        """What the method has to report besides the loss, now."""
        return {}

    def remaining(self, begun: int) -> float:
        """The share of the training's steps that are left once `begun` of them have begun; 1 if nobody knows."""
        return 1.0 if self.total_steps is None else max(0.0, 1 - begun / self.total_steps)

    def _gradients(self, closure: Closure | None) -> Tensor | None:
        """Leave the gradients that the update is of; a method that asks for the loss more often does that here.

        Returns:
            The loss of the first pass.
        """
        return None if closure is None else evaluated(closure)

    def _before_update(self) -> None:
        """What a method does to the gradients before they are limited."""

    def _update(self) -> None:
        """Limit the gradients of each group by themselves, and do AdamW's own part."""
        updates = []
        for number, group in enumerate(self.param_groups):
            moving, gradients = with_gradients(group["params"])
            if not moving:
                continue
            plan = self._plan(number, moving, gradients)
            if plan is None:
                self._update_each()
                return
            updates.append((plan, gradients, group))
        for plan, gradients, group in updates:
            plan.step_(gradients, self.state, group)

    def _plan(self, number: int, moving: list[Tensor], gradients: list[Tensor]) -> Plan | None:
        """How a group is updated; None if torch alone can. The first update is torch's, which begins the states."""
        if any(self.param_groups[number][key] for key in UNUSUAL):
            return None
        plan = self._plans.get(number)
        if plan is None or not plan.holds(moving, self.state):
            if not alike(moving, gradients) or not all(map(self.state.get, moving)):
                return None
            plan = self._plans[number] = Plan(moving, self.state)
        return plan

    def _update_each(self) -> None:
        for group in self.param_groups:
            if group["max_grad_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(group["params"], group["max_grad_norm"])
        # torch wraps the step of each class that is ever instantiated: super().step() could run step hooks twice.
        inspect.unwrap(torch.optim.AdamW.step)(self)

    def _after_update(self) -> None:
        """What a method does to the parameters once they have moved."""


def evaluated(closure: Closure) -> Tensor:
    """The loss of `closure`, which leaves its gradients."""
    with torch.enable_grad():
        return closure()


def adapter_places(model: PeftModel, parameters: list[Tensor]) -> list[int]:
    """Where each adapted layer's A1 and B1 are among `parameters`, in turn. A wrapper may replace the parameters.

    Raises:
        ValueError: a factor is not trained.
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    factors = [tensor for layer in primary_factors(model) for tensor in (layer.A, layer.B)]
    if not all(id(tensor) in places for tensor in factors):
        raise ValueError("a factor of the primary is frozen; this method moves A1 and B1 of each layer that has them")
    return [places[id(tensor)] for tensor in factors]


def descent_group(
    model: nn.Module, learning_rate: float, weight_decay: float, max_grad_norm: float | None
) -> dict[str, Any]:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
    params = list(primary_parameters(model).values())
    if not params:
        raise ValueError("the model has nothing to train; was its adapter loaded without is_trainable=True?")
    return {
        "params": params,
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
    }
