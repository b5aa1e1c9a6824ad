"""A trial on several workers: a Ray Train run inside of the Ray Tune process, which only passes reports on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import get_runtime_context

from bilora_ray.config import TrialConfig
from bilora_ray.errors import not_again
from bilora_ray.runners.task import (
    DIGESTS,
    EXPECTED,
    FOLDER,
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
from bilora_ray.training.folder import ORPHAN_WAIT_S, TrialFolder

# What a process asks for that is to be on the head: next to nothing of it.
ON_HEAD = {"node:__internal_head__": 0.001}


def run_trial_on_workers(task: Mapping[str, Any]) -> None:
    """As `run_trial`, on several workers: a Ray Train run inside of the Tune process, which only passes reports on.

    A worker that is lost ends the run, and Tune starts it again from the trial's checkpoint, with as many workers as
    there are then, if `resources` say that fewer will do.
    """
    from ray import tune
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from bilora_ray.runners.rendezvous import PrivateTorchConfig

    resources, trial = task[RESOURCES], the_only(task)
    workers, fewest = resources["workers"], resources["min_workers"]
    each = {"CPU": resources["cpus_per_worker"], "GPU": resources["gpus_per_worker"]}
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config=dict(task),
        torch_config=PrivateTorchConfig(),
        scaling_config=ScalingConfig(
            # Ray's annotations are still those of the Train before this one.
            num_workers=workers if fewest in (None, workers) else (fewest, workers),  # type: ignore[arg-type]
            use_gpu=each["GPU"] > 0,
            resources_per_worker={name: amount for name, amount in each.items() if amount},
        ),
        run_config=RunConfig(
            name="train",
            # For Train's notes on checkpoints of its own, of which there are none.
            storage_path=str(TrialFolder(Path(trial[FOLDER])).scratch),
            # What a controller tries again is only to find room for its workers, and a trial waits for that.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=-1),  # type: ignore[call-arg]
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
        ),
    )
    try:
        folder_of(trial)  # Train would make what is missing
        trainer.fit()
    except (*EXPECTED, TrainingFailedError) as error:
        expected = [cause for cause in map(_cause, _failures(error)) if cause is not None]
        if not expected:
            raise
        tune.report(explained(trial, expected[0]))


def _own(_: Mapping[str, Any]) -> dict[str, float]:
    """The process waits while its workers train: it takes no CPU that they need."""
    return ON_HEAD


def name_cluster() -> None:
    """Name this process's cluster where Ray Train asks for it: it would guess, and fail beside another Ray."""
    os.environ["RAY_ADDRESS"] = get_runtime_context().gcs_address


def _train_on_worker(task: Mapping[str, Any]) -> None:
    with not_again():
        import torch
        from ray import train
        from ray.train.torch import get_device

        import_training()
        from bilora_ray.training.distributed.workers import Workers
        from bilora_ray.training.loop import fit

    resources, trial = task[RESOURCES], the_only(task)
    if resources["gpus_per_worker"] > 0:
        torch.cuda.set_device(get_device())
    workers = Workers.joined(resources["workers"], resources["parallelism"] == "fsdp")
    folder = folder_of(trial)
    with workers.first(folder.lock(ORPHAN_WAIT_S)), not_again():
        config, report = TrialConfig(**trial[SETTINGS]), telling(train.report, trial)
        tell = moving(folder) if workers.is_first else lambda _: None
        fit(config, folder, report, workers, trial[DIGESTS], tell=tell)


def _failures(error: BaseException) -> list[BaseException]:
    """What a Train run ended with: on its workers, in its controller, or here."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        return list(error.worker_failures.values())
    return [error.controller_failure if isinstance(error, ControllerError) else error]


def _cause(error: BaseException) -> BaseException | None:
    """The expected error that a worker's failure is, or comes from; None if it is something else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, EXPECTED):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


RUNNER = Runner(run_trial_on_workers, _own, starts_workers=True)
