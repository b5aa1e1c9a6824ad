"""The winner of a search beside its base model, in a process that has what a worker of a trial has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError
from safetensors import SafetensorError

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, first_line, not_again
from bilora_ray.records import TrialRecord, Untrained
from bilora_ray.runners.task import EXPECTED, import_training

# So long it waits for room, where others use the cluster too.
ROOM_S = 120.0


class BesideBase:
    """An observer of a search that compares its winner once it has ended.

    To import what that takes is seconds. On CPUs it is done beside the last trials; a GPU is asked for behind them, for
    one of them might need it.

    Args:
        resources: those of a ResourceConfig: what one worker gets is what the process gets.
        num_trials: of the search.
    """

    def __init__(self, resources: Mapping[str, Any], num_trials: int) -> None:
        self._cpus, self._gpus = resources["cpus_per_worker"], resources["gpus_per_worker"]
        self._last = num_trials - 1
        self._process: Any = None

    def trial_started(self, trial: TrialRecord) -> None:
        """Begin to import, if no trial is left to start, and none waits for what this takes."""
        if trial.number >= self._last and not self._gpus:
            self._begin()

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def trial_ended(self, trial: TrialRecord) -> None:
        """Nothing."""

    def compare(
        self, settings: Mapping[str, Any], folder: Path, adapter: Path, digests: Mapping[str, str], measured: bool
    ) -> Untrained:
        """See `untrained.compare`; the `settings` are those of a TrialConfig.

        Raises:
            UserError, MachineError, OSError, TrialFailure: as `fit`; or the cluster has no room for it now.
        """
        self._begin()
        try:
            ray.get(self._process.__ray_ready__.remote(), timeout=ROOM_S)
            told = ray.get(self._process.compare.remote(dict(settings), folder, adapter, dict(digests), measured))
        except GetTimeoutError:
            raise MachineError(f"there was no room on the cluster for {ROOM_S:.0f} s") from None
        except RayError as error:
            raise MachineError(first_line(getattr(error, "cause", None) or error)) from None
        if isinstance(told, SafetensorError):
            raise MachineError(first_line(told))
        if isinstance(told, Exception):
            raise told
        return cast(Untrained, told)

    def _begin(self) -> None:
        if self._process is None:
            room = {"num_cpus": self._cpus if self._gpus else 0, "num_gpus": self._gpus}
            self._process = ray.remote(max_restarts=0, **room)(_Process).remote(self._cpus, self._gpus)


class _Process:
    """Runs on the cluster. Errors come back as they are, and not in Ray's words."""

    def __init__(self, cpus: float, gpus: float) -> None:
        import_training()
        import torch

        from bilora_ray.training.compute.memory import keep_to_share

        torch.set_num_threads(max(1, int(cpus)))  # as Ray says it to a trial, or the last digits were others
        keep_to_share(gpus)

    def compare(
        self, settings: dict[str, Any], folder: Path, adapter: Path, digests: dict[str, str], measured: bool
    ) -> Any:
        from bilora_ray.training.folder import TrialFolder
        from bilora_ray.training.probe.untrained import compare

        try:
            with not_again():
                return compare(TrialConfig(**settings), TrialFolder(folder), adapter, digests, measured)
        except EXPECTED as error:
            return error
