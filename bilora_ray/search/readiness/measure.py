"""The extreme trials of a space, run where its search would run them."""

from __future__ import annotations

import time

from bilora_ray.search.cluster.cluster import capacity, check_address, cluster, is_own, total
from bilora_ray.search.cluster.gpus import decided
from bilora_ray.search.readiness.estimate import Estimate, ends, estimate
from bilora_ray.search.readiness.machine import free_memory
from bilora_ray.search.space import Space


def measure(space: Space, ray_address: str | None) -> Estimate:
    """What the search of `space` takes on the cluster at `ray_address`; None: one on this machine.

    Raises:
        UserError: as a search of it would, or a trial of the space does not fit.
    """
    from bilora_ray.runners.measuring import measured, memory_of_device

    check_address(ray_address)
    resources = space.resources.model_dump()
    began = time.monotonic()
    with cluster(ray_address):
        if space.fixed.get("precision") == "auto":
            space = decided(space, is_own(ray_address))
        started = time.monotonic() - began
        has_room = capacity(space.resources, total())
        at_once = min(space.study.num_trials, space.study.max_concurrent or has_room, has_room)
        found = measured(ends(space), resources)
        if space.resources.gpus_per_worker:
            room = int(memory_of_device(resources) * min(1.0, space.resources.gpus_per_worker))
        else:
            room = free_memory() // (at_once * space.resources.workers)
    return estimate(space, found, at_once, room, started)
