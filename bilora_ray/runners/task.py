"""What goes into a trial's process and what comes out of it, whoever runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address
from safetensors import SafetensorError

from bilora_ray.errors import MachineError, TrialFailure, UserError, first_line
from bilora_ray.garbage import importing
from bilora_ray.records import Moving
from bilora_ray.training.folder import TrialFolder

# The keys of a task: the trials that run together, and what they get. Those of each of its trials.
TRIALS, RESOURCES = "trials", "resources"
NUMBER, FOLDER, SETTINGS, DIGESTS = "number", "folder", "settings", "digests"
# The keys of a report, beside the trial's number: an evaluation's metrics; or why this trial cannot go on, and whether
# its own settings are why; or what is wrong with its settings or data; or what is wrong with the machine, so that the
# trial may go on another time.
EVALUATION, FAILURE, BY_SETTINGS, BAD_INPUT, BROKEN = "evaluation", "failure", "by_settings", "bad_input", "broken"
# So often at the most a trial notes its steps.
TELL_S = 2.0
EXPECTED = (TrialFailure, UserError, OSError, SafetensorError)


@dataclass(frozen=True)
class Runner:
    """A way to run a task.

    Attributes:
        run: a task -> nothing; what a Tune process does.
        own: what the task gets, as its `resources` say -> what that process takes of it for itself.
        starts_workers: whether it has others train; then its process is not used again for the next task.
    """

    run: Callable[[Mapping[str, Any]], None]
    own: Callable[[Mapping[str, Any]], dict[str, float]]
    starts_workers: bool


def import_training() -> None:
    """Import what `fit` needs, in silence: seconds, the first time in a process. Raises whatever an import raises."""
    with importing():
        from bilora_ray.quiet import quiet

        quiet()
        import bilora_ray.training.loop  # noqa: F401 - to have it


def the_only(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """The trial of a task that has one."""
    (trial,) = task[TRIALS]
    return trial


def telling(report: Callable[[dict[str, Any]], None], trial: Mapping[str, Any]) -> Callable[[dict[str, float]], bool]:
    """What `fit` tells its evaluations to: they go to Tune, which ends a trial that shall not go on by itself."""

    def tell(evaluation: dict[str, float]) -> bool:
        report({NUMBER: trial[NUMBER], EVALUATION: evaluation})
        return True

    return tell


def moving(folder: TrialFolder) -> Callable[[Moving], None]:
    """What `fit` tells its steps to: a file of the trial's, where whoever shows the search finds them now and then."""
    told, at = "", 0.0

    def tell(now: Moving) -> None:
        nonlocal told, at
        if now.what != told or time.monotonic() >= at + TELL_S:
            told, at = now.what, time.monotonic()
            folder.moves(now)

    return tell


def explained(trial: Mapping[str, Any], error: BaseException) -> dict[str, Any]:
    """The report of a trial that ended with one of the `EXPECTED` errors."""
    if isinstance(error, TrialFailure):
        return {NUMBER: trial[NUMBER], FAILURE: str(error), BY_SETTINGS: error.by_settings}
    if isinstance(error, UserError) and not isinstance(error, MachineError):
        return {NUMBER: trial[NUMBER], BAD_INPUT: str(error)}
    return {NUMBER: trial[NUMBER], BROKEN: first_line(error)}


def folder_of(trial: Mapping[str, Any]) -> TrialFolder:
    """The trial's folder, which the search has made; OSError where it is not: a new one would be lost."""
    folder = TrialFolder(Path(trial[FOLDER]))
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{folder.path} is not on node {get_node_ip_address()}; all nodes must share it")
    return folder
