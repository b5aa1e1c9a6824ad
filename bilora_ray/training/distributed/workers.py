"""The processes that train one trial together: this one alone, or all of a torch process group.

Each step's rows are those that one worker would take; every worker takes its share of them. So the number of workers
decides how fast a trial is, and not what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """The workers of one trial, as one of them sees them.

    Attributes:
        planned: workers that the settings are for: a step takes `planned` times the rows of one. Fewer of them, when
            one was lost, take more passes for the same step.
        sharded: whether each holds a part of the weights (FSDP). Then all must run as many forward passes.
        rank: of this one.
        world_size: how many there are now.
    """

    planned: int = 1
    sharded: bool = False
    rank: int = 0
    world_size: int = 1

    @classmethod
    def joined(cls, planned: int, sharded: bool) -> Workers:
        """Those of the torch process group that this process has joined; it alone if it has joined none."""
        if not dist.is_initialized():
            return cls(planned, sharded)
        return cls(planned, sharded, dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this one writes for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This worker's part of `items`, each with whether it counts: all get equally many, the last may be repeats."""
        rounds = -(-len(items) // self.world_size)
        own = range(self.rank, rounds * self.world_size, self.world_size)
        return [(items[index % len(items)], index < len(items)) for index in own]

    def map(self, compute: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`compute` of each item, in the order of `items`, each computed by one worker and known to all."""
        results = [compute(item) for item, counts in self.share(items) if counts or self.sharded]
        parts = self.gather(results)
        return [parts[index % self.world_size][index // self.world_size] for index in range(len(items))]

    def gather(self, value: R) -> list[R]:
        """Each worker's `value`, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def same_seeds(self, count: int, device: torch.device) -> list[int]:
        """So many seeds, drawn from torch's generator: the first worker's, which all others get. All call it."""
        seeds = torch.randint(2**62, (count,))
        if self.world_size > 1:  # alone no device is waited for
            seeds = self.total((seeds if self.is_first else torch.zeros_like(seeds)).to(device))
        return [int(seed) for seed in seeds.tolist()]

    def total(self, value: Tensor) -> Tensor:
        """The sum of each worker's `value`, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    @contextmanager
    def first(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """The first worker enters `context` for the block, and the others begin when it has."""
        with context if self.is_first else nullcontext():
            self.wait()
            yield

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.world_size > 1:
            dist.barrier()


ALONE = Workers()


def seed_worker(seed: int, rank: int) -> None:
    """Start torch's generators. The first worker's are those of one worker alone; dropout differs between workers."""
    torch.manual_seed((seed + rank * 0x9E3779B9) % 2**63)


def random_states() -> dict[str, Tensor]:
    """Where torch's generators stand: the CPU's, and that of the GPU in use. Asking a GPU's is no wait for it."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Have torch's generators go on from `states`; those that are not in it stay where they are."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def drawing_again(states: Mapping[str, Tensor]) -> Iterator[None]:
    """In the block draw what was drawn from `states` on, and after it go on as if the block had drawn nothing."""
    now = random_states()
    set_random_states(states)
    try:
        yield
    finally:
        set_random_states(now)
