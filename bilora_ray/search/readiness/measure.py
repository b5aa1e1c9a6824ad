"""The extreme trials of a space, run where its search would run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from bilora_ray.errors import UserError
from bilora_ray.search.cluster.cluster import capacity, check_address, cluster, is_own, nodes, workers_on
from bilora_ray.search.cluster.gpus import decided
from bilora_ray.search.readiness.estimate import Estimate, ends, estimate
from bilora_ray.search.readiness.machine import free_memory
from bilora_ray.search.space import ResourceConfig, Space


def measure(
    space: Space, ray_address: str | None, tell: Callable[[int, int], None] = lambda done, count: None
) -> Estimate:
    """What the search of `space` takes on the cluster at `ray_address`; None: one on this machine.

    `tell` hears how many of all measurements are done.

    Raises:
        UserError: as a search of it would, or a trial of the space does not fit, or each worker would have a part of
            the model, of which nothing is measured.
    """
    from bilora_ray.runners.measuring import measured, memory_of_gpus, on_each

    if space.resources.parallelism == "fsdp":
        raise UserError("estimate: resources.parallelism: fsdp is not measured, only whole models on one worker are")
    check_address(ray_address)
    began = time.monotonic()
    with cluster(ray_address):
        if space.fixed.get("precision") == "auto":
            space = decided(space, is_own(ray_address))
        started = time.monotonic() - began
        has = nodes()
        has_room = capacity(space.resources, list(has.values()))
        at_once = min(space.study.num_trials, space.study.max_concurrent or has_room, has_room)
        workers = at_once * space.resources.workers
        found = measured(ends(space), space.resources.model_dump(), workers, tell)
        asked = [node for node in has if workers_on(has[node], space.resources)]
        gpus = space.resources.gpus_per_worker > 0
        told = on_each(asked, memory_of_gpus if gpus else free_memory, gpus)
    return estimate(space, found, at_once, least_room(told, has, space.resources, workers), started)


def least_room(
    told: Mapping[str, int], has: Mapping[str, Mapping[str, float]], resources: ResourceConfig, workers: int
) -> int:
    """Bytes that each of `workers` that run at one time has at the least.

    Args:
        told: node -> its free memory; or, where workers have GPUs, that of its smallest GPU.
        has: node -> what it has.
        resources: of a trial.
        workers: of all trials that run at one time.
    """
    if resources.gpus_per_worker:
        return int(min(told.values()) * min(1.0, resources.gpus_per_worker))
    return min(free // min(workers, workers_on(has[node], resources)) for node, free in told.items())
