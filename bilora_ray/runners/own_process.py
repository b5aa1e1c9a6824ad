"""A trial in the Ray Tune process that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from bilora_ray.config import CUDA_GIB, TrialConfig
from bilora_ray.runners.task import EVALUATION, EXPECTED, RESOURCES, SETTINGS, explained, folder_of
from bilora_ray.training.folder import ORPHAN_WAIT_S


def run_trial(task: Mapping[str, Any]) -> None:
    """Train one trial in this process, going on from its checkpoint if there is one.

    Args:
        task: `number` of the trial, its `folder` (an absolute path), its `settings` (those of a TrialConfig), and its
            `resources` (those of a ResourceConfig).
    """
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.training.loop import fit

    _keep_to_share(task[RESOURCES]["gpus_per_worker"])
    try:
        folder = folder_of(task)
        with folder.lock(ORPHAN_WAIT_S):
            fit(TrialConfig(**task[SETTINGS]), folder, _report)
    except EXPECTED as error:
        tune.report(explained(error))


def _report(metrics: dict[str, float]) -> bool:
    tune.report({EVALUATION: metrics})
    return True  # a trial that shall not go on is ended by Tune


def _keep_to_share(gpus: float) -> None:
    """Let a trial that has a part of a GPU run out of memory at its own part, and not at that of its neighbours."""
    import torch

    if 0 < gpus < 1 and torch.cuda.is_available():
        total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(max(gpus - CUDA_GIB / total_gib, 0.01))
