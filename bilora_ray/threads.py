"""How many threads help on this machine, for who computes in this process: in a search, Ray says it for each trial."""

from __future__ import annotations

import os
from pathlib import Path

OMP_NUM_THREADS = "OMP_NUM_THREADS"
# How much of its processors a container may use: in microseconds, of how many. Of the second version, and of the first.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
QUOTA_1, PERIOD_1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def use_fitting_threads(begun_with: int | None = None) -> int:
    """Have torch use as many threads as there are processors for, unless `OMP_NUM_THREADS` says how many.

    torch takes one for each core, which then wait for each other where other processes have some of them: a training
    took four times as long on all cores of a busy machine as on one.

    Args:
        begun_with: how many a training that goes on has had until now: with others its last digits would be others,
            and what it did itself in the last minute is no reason for fewer.

    Returns:
        How many it uses.
    """
    import torch

    if OMP_NUM_THREADS not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), begun_with or free_processors())))
    return torch.get_num_threads()


def free_processors() -> int:
    """The processors that this process may use, less those that were busy in the last minute; one at the least."""
    all_of_them = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_of_them
    busy = round(os.getloadavg()[0])
    return max(1, min(allowed, quota() or allowed, all_of_them - busy))


def quota() -> int | None:
    """How many processors a container may use, rounded up; None if it may use all."""
    try:
        texts = QUOTA.read_text().split() if QUOTA.exists() else [QUOTA_1.read_text(), PERIOD_1.read_text()]
        used, period = (int(text) for text in texts)
    except (OSError, ValueError):  # there are no such files, or it says `max`
        return None
    return max(1, -(-used // period)) if used > 0 and period > 0 else None
