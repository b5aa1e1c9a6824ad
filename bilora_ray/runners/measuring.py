"""What trials take, measured where a search would run them: each in a Ray process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, TrialFailure, UserError, first_line, not_again
from bilora_ray.runners.task import EXPECTED, import_training

if TYPE_CHECKING:
    from bilora_ray.training.probe.cost import Cost

# So many run at one time at the least, if there are as many in the search: more tell little more.
MOST_AT_ONCE = 8
ANSWER_TIMEOUT_S = 60.0
# What asks has so much of a GPU, of what Ray hands out, and sees all that the node has.
SHARE = 0.001
ALL_VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def measured(
    settings: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Any],
    at_once: int,
    tell: Callable[[int, int], None] = lambda done, count: None,
) -> list[tuple[float, Cost] | TrialFailure]:
    """Seconds of what a first trial of a process imports, and what one of each `settings` takes, in that order.

    As many are run at one time as in a search, which takes some of them more than once.

    Args:
        settings: those of a TrialConfig.
        resources: those of a ResourceConfig: what one worker gets is what each process gets.
        at_once: workers that run at one time in the search.
        tell: hears how many of all measurements are done.

    Raises:
        UserError, MachineError: as `fit`.
    """
    # A process that had another trial would tell of that one's memory too.
    room = {"num_cpus": resources["cpus_per_worker"], "num_gpus": resources["gpus_per_worker"]}
    task = ray.remote(max_calls=1, max_retries=0, **room)(_measure)
    runs = [index % len(settings) for index in range(len(settings) + spare(len(settings), at_once))]
    found: list[list[Any]] = [[] for _ in settings]
    running: dict[ray.ObjectRef, int] = {}
    count = len(runs)
    tell(0, count)
    while runs or running:
        while runs and len(running) < at_once:
            index = runs.pop(0)
            asked = task.remote(dict(settings[index]), resources["workers"], resources["gpus_per_worker"])
            running[asked] = index
        (done,), _ = ray.wait(list(running), num_returns=1)
        found[running.pop(done)].append(_told(done))
        tell(count - len(runs) - len(running), count)
    return [_middle(each) for each in found]


def spare(count: int, at_once: int) -> int:
    """How many of `count` trials are run once more, so that none runs with fewer beside it than in the search."""
    return -count % min(at_once, MOST_AT_ONCE)


def _told(done: ray.ObjectRef) -> tuple[float, Cost] | TrialFailure:
    try:
        told = ray.get(done)
    except RayError as error:
        raise MachineError(f"a trial that was measured ended with its process ({first_line(error)})") from None
    if isinstance(told, UserError):
        raise told
    if isinstance(told, Exception) and not isinstance(told, TrialFailure):
        raise MachineError(first_line(told))
    return cast("tuple[float, Cost] | TrialFailure", told)


def _middle(found: Sequence[tuple[float, Cost] | TrialFailure]) -> tuple[float, Cost] | TrialFailure:
    """Of one trial's measurements that with the middle step; a failure, if there is one."""
    failed = next((told for told in found if isinstance(told, TrialFailure)), None)
    ranked = sorted((told for told in found if not isinstance(told, TrialFailure)), key=lambda told: told[1].step)
    return failed or ranked[len(ranked) // 2]


def on_each(nodes: Sequence[str], question: Callable[[], int], gpus: bool) -> dict[str, int]:
    """Node -> what `question` answers there, in a process that sees all of the node's GPUs if it is about those.

    Raises:
        MachineError: a node does not answer.
    """
    seeing: dict[str, Any] = {"num_gpus": SHARE, "runtime_env": {"env_vars": ALL_VISIBLE}} if gpus else {}
    task = ray.remote(max_calls=1, max_retries=0)(question)
    there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    asked = [task.options(scheduling_strategy=strategy, num_cpus=0, **seeing).remote() for strategy in there.values()]
    try:
        return dict(zip(nodes, ray.get(asked, timeout=ANSWER_TIMEOUT_S), strict=True))
    except RayError as error:
        line = first_line(getattr(error, "cause", None) or error)
        raise MachineError(f"a node does not say how much memory it has ({line})") from None


def memory_of_gpus() -> int:
    """Bytes of memory of the smallest GPU of this machine that torch sees."""
    import torch

    sizes = (torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return min(sizes)


def _measure(settings: dict[str, Any], workers: int, gpus: float) -> Any:
    """Runs on the cluster. Errors come back as they are, and not in Ray's words."""
    try:
        with not_again():
            import ray.tune  # noqa: F401 - which a trial's process holds, too

            started = time.perf_counter()
            import_training()
            from bilora_ray.training.probe.cost import cost

            imported = time.perf_counter() - started
            return imported, cost(TrialConfig(**settings), workers, gpus)
    except EXPECTED as error:
        return error
