"""When a trial is stopped early: a file a scheduler, which is a function of what it is `Asked`."""

from __future__ import annotations

from collections.abc import Callable

from bilora_ray.search.study.schedulers import asha, hyperband, median, nondominated, none, pbt
from bilora_ray.search.study.schedulers.base import Asked, once

# What `study.scheduler` says -> whether a trial is stopped.
SCHEDULERS: dict[str, Callable[[Asked], bool]] = {
    "asha": asha.is_weak,
    "hyperband": hyperband.is_weak,
    "median": once(median.is_weak),
    "pbt": once(pbt.is_weak),
    "none": none.is_weak,
}
# The same, of a study with several objectives.
OF_SEVERAL: dict[str, Callable[[Asked], bool]] = {
    "asha": once(nondominated.is_weak),
    "none": none.is_weak,
}
