"""The loss of a step's rows and its gradient, pass by pass and shared among the workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bilora_ray.errors import NonFiniteLoss
from bilora_ray.method import MethodAdamW
from bilora_ray.training.compute.cutting import Budget, cut, positions
from bilora_ray.training.compute.memory import ONE_ROW, Room, Shortage, failure, release, smaller
from bilora_ray.training.compute.varlen import batch_of, is_flat, placed
from bilora_ray.training.distributed.parallel import Network
from bilora_ray.training.distributed.workers import drawing_again, random_states, set_random_states


class Gradients:
    """What computes the gradient of a step, over as many passes as it takes.

    Args:
        task: what its loss is, and what it is of: see `tasks.base.Task`.
        processor: what makes its batches.
        network: computes.
        optimizer: clears the gradients.
        room: what is known of the passes that have room.
        device: where the network computes.
    """

    def __init__(
        self,
        task: Any,
        processor: Any,
        network: Network,
        optimizer: MethodAdamW,
        room: Room,
        device: torch.device,
    ) -> None:
        self.config = room.config
        self.task = task
        self.processor = processor
        self.network = network
        self.device = device
        self.optimizer = optimizer
        self.room = room
        self.workers = room.workers
        # What all workers know, so that they cut a step alike.
        self.agreed = room.proven.training

    def closure(self, examples: list[Any]) -> StepClosure:
        """What a method calls as often as it needs in one step: the loss of `examples`, with its gradient."""
        return StepClosure(self, examples)

    def of(self, examples: list[Any], states: Mapping[str, Tensor] | None = None) -> Tensor:
        """The mean loss over the target tokens or rows of `examples`, weighted if so set, with its gradient.

        Where a pass has no room all of them are computed once more, smaller and from the same random `states`. Each
        worker does that by itself: the others wait for its gradient, and only for that.

        Raises:
            OutOfMemory: there is no room for one row, nor after what nobody holds was freed.
        """
        # Known without asking a GPU, or another worker, for a number: that is to wait for it.
        targets = self.task.target_count(examples)
        is_last = self.room.cannot_retry
        while not isinstance(found := self._tried(examples, targets), Tensor):
            self.optimizer.zero_grad()
            release()
            if found is not None and is_last:
                raise failure(ONE_ROW["training"], found, self.config)
            is_last = is_last or found is not None
            set_random_states(states or {})
        self.network.share_gradients()
        return self.workers.total(found)

    def by_row(self, examples: Sequence[Any], gradient: bool, seeds: Sequence[int]) -> Tensor:
        """What each of `examples` has in their mean loss, (examples,), computed one by one.

        There is no smaller pass than of one row.

        Args:
            examples: the rows.
            gradient: whether that of the mean is what the parameters have then.
            seeds: of what each row draws, whichever worker computes it.
        """
        if gradient:
            self.optimizer.zero_grad()
        targets = self.task.target_count(examples)
        found = torch.zeros(len(examples), device=self.device)
        own = self.workers.share(range(len(examples)))
        for number, (row, counts) in enumerate(own, start=1):
            self.network.accumulating(last=number == len(own))
            weight = self.task.target_count([examples[row]]) / targets if counts and targets else 0.0
            torch.manual_seed(seeds[row])
            with torch.set_grad_enabled(gradient):
                part = self._pass([examples[row]], weight, gradient)
            if counts:
                found[row] = part
        if gradient:
            self.network.share_gradients()
        return self.workers.total(found)

    def agree(self) -> None:
        """Let all workers know which passes have room for each. All call it."""
        self.room.agree()
        self.agreed = self.room.proven.training

    def _tried(self, examples: list[Any], targets: float) -> Tensor | Shortage | None:
        """This worker's part of the loss, with its gradient; None if a pass had no room, and a smaller one may have.

        Of a pass that is as small as can be it is what was missing.
        """
        self.optimizer.zero_grad()
        passes, part = self._passes(examples), examples
        total = torch.zeros((), device=self.device)
        try:
            for number, (part, counts) in enumerate(passes, start=1):
                self.network.accumulating(last=number == len(passes))
                own = self.task.target_count(part) if counts else 0
                total += self._pass(part, own / targets if own else 0.0)
        except (RuntimeError, MemoryError) as error:
            sides = [self.task.sides(example) for example in part]
            size = positions(sides, padded=not is_flat(self.task, self.network))
            shortage = smaller(self.room, "training", len(part), size, error)
        else:
            return total
        return shortage

    def _passes(self, examples: list[Any]) -> list[tuple[list[Any], bool]]:
        """This worker's passes, each with whether it counts."""
        known = self.room.proven.training
        if self.workers.world_size == 1:
            self.agreed = known
        own = self.workers.share(self._cut(examples, self.agreed, self.workers.world_size))
        if self.workers.sharded:
            return own
        # Only of parts of a model must all run as many passes. Who has none of its own takes part with no weight.
        counting = [part for part, counts in own if counts]
        parts = counting or [part for part, _ in own]
        if known != self.agreed:
            parts = self._cut(list(chain.from_iterable(parts)), known)
        return [(part, bool(counting)) for part in parts]

    def _pass(self, part: list[Any], weight: float, gradient: bool = True) -> Tensor:
        """The loss of one pass, times its `weight`, whose `gradient` is added to what there is."""
        batch = placed(self.batch(part), self.device)
        loss = self.task.loss(self.network, batch)
        if not weight:  # the mean over no target is NaN, and so is nothing of it; parts of a model need the pass
            loss = loss.nan_to_num(0.0)
        loss = loss * weight
        if gradient:
            (loss * self.network.divides_by).backward()
        return loss.detach()

    def batch(self, examples: Sequence[Any]) -> dict[str, Any]:
        """What a pass over `examples` reads, in main memory."""
        return batch_of(self.task, self.network, examples, self.processor)

    def _cut(self, examples: list[Any], proven: int | None, workers: int = 1) -> list[list[Any]]:
        sides = [self.task.sides(example) for example in examples]
        padded = not is_flat(self.task, self.network)
        budget = Budget(self.config.per_device_train_batch_size, self.config.tokens_per_pass, proven, padded)
        parts = cut(sides, budget, self.device.type, workers)
        return [[examples[row] for row in part] for part in parts]


class StepClosure:
    """The loss of the rows of one step, as often as a method asks for it: a `RowClosure`.

    Each call sees the same dropout, and none waits for a number. Row by row that is another one than of all of them,
    and the same of each row, whichever others are asked for.

    Args:
        gradients: compute it.
        examples: the rows.
    """

    def __init__(self, gradients: Gradients, examples: list[Any]) -> None:
        self._gradients = gradients
        self._examples = examples
        self._before = random_states()
        self._called = False
        self._seeds: list[int] | None = None

    def __call__(self) -> Tensor:
        """The mean loss, with its gradient."""
        if self._called:
            with drawing_again(self._before):
                return self._gradients.of(self._examples, self._before)
        self._called = True
        return self._gradients.of(self._examples, self._before)

    def by_row(self, rows: Sequence[int] | None = None, gradient: bool = True) -> Tensor:
        """See `RowClosure`: a pass for each row."""
        if self._seeds is None:
            workers, device = self._gradients.workers, self._gradients.device
            self._seeds = workers.same_seeds(len(self._examples), device)
        places = range(len(self._examples)) if rows is None else rows
        examples, seeds = [self._examples[row] for row in places], [self._seeds[row] for row in places]
        with drawing_again(random_states()):
            return self._gradients.by_row(examples, gradient, seeds)


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
