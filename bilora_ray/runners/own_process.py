"""A trial in the Ray Tune process that it was given."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import not_again
from bilora_ray.records import IMPORTING, Moving
from bilora_ray.runners.task import (
    DIGESTS,
    EXPECTED,
    RESOURCES,
    SETTINGS,
    Runner,
    explained,
    folder_of,
    import_training,
    moving,
    telling,
    the_only,
)
from bilora_ray.training.folder import ORPHAN_WAIT_S


def run_trial(task: Mapping[str, Any]) -> None:
    """Train one trial in this process, going on from its checkpoint if there is one.

    Args:
        task: `trials`, of which there is one: its `number`, its `folder` (an absolute path), its `settings` (those of a
            TrialConfig) and the `digests` of what these name (see `fit`); and `resources` (those of a ResourceConfig).
    """
    from ray import tune  # which a search needs only once its cluster has started

    trial = the_only(task)
    try:
        with not_again():  # nor what an import raises
            folder = folder_of(trial)
            tell = moving(folder)
            tell(Moving(IMPORTING))
            import_training()
            from bilora_ray.training.compute.memory import keep_to_share
            from bilora_ray.training.loop import fit

            # What is imported stays: to search it for what a trial has left takes tenths of a second each time.
            if not gc.get_freeze_count():
                gc.freeze()
            keep_to_share(task[RESOURCES]["gpus_per_worker"])
            with folder.lock(ORPHAN_WAIT_S):
                config, report = TrialConfig(**trial[SETTINGS]), telling(tune.report, trial)
                fit(config, folder, report, digests=trial[DIGESTS], keep_base=True, tell=tell)
    except EXPECTED as error:
        tune.report(explained(trial, error))


def _own(resources: Mapping[str, Any]) -> dict[str, float]:
    return {"CPU": resources["cpus_per_worker"], "GPU": resources["gpus_per_worker"]}


RUNNER = Runner(run_trial, _own, starts_workers=False)
