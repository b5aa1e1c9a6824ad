"""How a trial is run: the same `fit`, in a Ray Tune process of its own, or on workers that one starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilora_ray.runners import nested, own_process
from bilora_ray.runners.task import Runner


def runner_for(resources: Mapping[str, Any]) -> Runner:
    """The runner of tasks that get `resources` (those of a ResourceConfig): a line a runner."""
    if resources["workers"] > 1:
        return nested.RUNNER
    return own_process.RUNNER
