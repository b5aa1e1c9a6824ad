"""The loss of a step's rows and its gradient, pass by pass and shared among the workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilora_ray.config import TrialConfig
from bilora_ray.errors import NonFiniteLoss
from bilora_ray.method import MethodAdamW
from bilora_ray.method.base import Closure
from bilora_ray.training import model as models
from bilora_ray.training.compute.cutting import Budget, cut
from bilora_ray.training.distributed.parallel import Network
from bilora_ray.training.distributed.workers import Workers, drawing_again, random_states
from bilora_ray.training.loading import Loaded
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, balanced, cross_entropy


class Gradients:
    """What computes the gradient of a step, over as many passes as it takes.

    Args:
        config: the settings.
        data: the rows, from which balanced weights of classes are counted.
        network: computes.
        optimizer: clears the gradients.
        workers: who share the passes.
    """

    def __init__(
        self, config: TrialConfig, data: Loaded, network: Network, optimizer: MethodAdamW, workers: Workers
    ) -> None:
        self.config = config
        self.task = TASKS[config.task]
        self.tokenizer = data.tokenizer
        self.network = network
        self.optimizer = optimizer
        self.workers = workers
        self.class_weights = self._class_weights(data)
        self.weights_of_classes = torch.tensor(self.class_weights or (), device=models.device())

    def closure(self, examples: list[Example]) -> Closure:
        """What a method calls as often as it needs in one step: the loss of `examples`, with its gradient.

        Each call sees the same dropout, and none waits for a number.
        """
        before = random_states()
        called = False

        def closure() -> Tensor:
            nonlocal called
            if called:
                with drawing_again(before):
                    return self._backward(examples)
            called = True
            return self._backward(examples)

        return closure

    def _backward(self, examples: list[Example]) -> Tensor:
        """The mean loss over the target tokens or rows of `examples`, weighted if so set, with its gradient."""
        self.optimizer.zero_grad()
        passes = self.workers.share(self._cut(examples))
        # Known without asking a GPU, or another worker, for a number: that is to wait for it.
        targets = self._targets(examples)
        total = torch.zeros((), device=models.device())
        for number, (part, counts) in enumerate(passes, start=1):
            with self.network.accumulating(last=number == len(passes)):
                total += self._pass(part, counts * self._targets(part) / targets)
        return self.workers.total(total)

    def _pass(self, part: list[Example], weight: float) -> Tensor:
        """The loss of one pass, times its `weight`, whose gradient is added to what there is."""
        batch = {key: tensor.to(models.device(), non_blocking=True) for key, tensor in self.batch(part).items()}
        loss = self._loss(batch) * weight
        # Workers share the mean of their gradients; the loss is a sum over them.
        (loss * self.workers.world_size).backward()
        return loss.detach()

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """What a pass over `examples` reads, in main memory."""
        return self.task.collate(examples, self.tokenizer)

    def _cut(self, examples: list[Example]) -> list[list[Example]]:
        sides = [self.task.sides(example) for example in examples]
        budget = Budget(self.config.per_device_train_batch_size, self.config.tokens_per_pass)
        parts = cut(sides, budget, models.device().type, self.workers.world_size)
        return [[examples[row] for row in part] for part in parts]

    def _targets(self, examples: Sequence[Example]) -> float:
        """How much `examples` count in a mean loss: their targets, or the weights of these."""
        if self.class_weights is None:
            return self.task.target_count(examples)
        return math.fsum(self.class_weights[label] for label in _classes(examples))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.class_weights is None:
            return self.task.loss(self.network, batch)
        return cross_entropy(*self.task.forward(self.network, batch), self.weights_of_classes)

    def _class_weights(self, data: Loaded) -> list[float] | None:
        if self.config.class_weights is None:
            return None
        return balanced(_classes(data.train), len(data.label_names or ()))


class LateLosses:
    """Looks at the loss of a step when the next one has been started, so that a GPU is never waited for amid a step.

    What a step that failed has done to the weights is not undone: nothing is to be written before `check_all`.
    """

    def __init__(self) -> None:
        self._waiting: tuple[int, Tensor, Any] | None = None

    def add(self, step: int, loss: Tensor) -> None:
        """Remember the loss of `step`, and look at the one before. NonFiniteLoss if that was none."""
        before = self._waiting
        # To memory that a GPU writes by itself, with an event behind it.
        value, event = loss.detach().to("cpu", non_blocking=True), None
        if loss.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._waiting = step, value, event
        _check(before)

    def check_all(self) -> None:
        """Look at the last loss too. NonFiniteLoss if it was none."""
        before, self._waiting = self._waiting, None
        _check(before)


def _check(waiting: tuple[int, Tensor, Any] | None) -> None:
    if waiting is None:
        return
    step, loss, event = waiting
    if event is not None:
        event.synchronize()
    if not math.isfinite(value := float(loss)):
        raise NonFiniteLoss(step, value)


def _classes(examples: Iterable[Example]) -> Iterator[int]:
    """The classes that a task with classes predicts."""
    return (label for example in examples for label in example.labels if label != IGNORED)
