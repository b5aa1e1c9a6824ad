"""What trials take, measured where a search would run them: each in a Ray process of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, TrialFailure, UserError, first_line, not_again
from bilora_ray.runners.task import EXPECTED, import_training

if TYPE_CHECKING:
    from bilora_ray.training.probe.cost import Cost


def measured(
    settings: Sequence[Mapping[str, Any]], resources: Mapping[str, Any]
) -> list[tuple[float, Cost] | TrialFailure]:
    """Seconds of what a first trial of a process imports, and what one of each `settings` takes, in that order.

    As many are run at one time as have room, as in a search.

    Args:
        settings: those of a TrialConfig.
        resources: those of a ResourceConfig: what one worker gets is what each process gets.

    Raises:
        UserError, MachineError: as `fit`.
    """
    # A process that had another trial would tell of that one's memory too.
    room = {"num_cpus": resources["cpus_per_worker"], "num_gpus": resources["gpus_per_worker"]}
    task = ray.remote(max_calls=1, max_retries=0, **room)(_measure)
    asked = [task.remote(dict(one), resources["workers"], resources["gpus_per_worker"]) for one in settings]
    found = []
    for each in asked:
        try:
            told = ray.get(each)
        except RayError as error:
            raise MachineError(f"a trial that was measured ended with its process ({first_line(error)})") from None
        if isinstance(told, TrialFailure) or not isinstance(told, Exception):
            found.append(told)
        elif isinstance(told, UserError):
            raise told
        else:
            raise MachineError(first_line(told))
    return found


def memory_of_device(resources: Mapping[str, Any]) -> int:
    """Bytes of memory of the smallest GPU that a worker with `resources` may get."""
    task = ray.remote(_memory_of_device).options(max_retries=0, num_cpus=0, num_gpus=resources["gpus_per_worker"])
    return int(ray.get(task.remote()))


def _memory_of_device() -> int:
    import torch

    sizes = (torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return min(sizes)


def _measure(settings: dict[str, Any], workers: int, gpus: float) -> Any:
    """Runs on the cluster. Errors come back as they are, and not in Ray's words."""
    try:
        with not_again():
            started = time.perf_counter()
            import_training()
            from bilora_ray.training.probe.cost import cost

            imported = time.perf_counter() - started
            return imported, cost(TrialConfig(**settings), workers, gpus)
    except EXPECTED as error:
        return error
