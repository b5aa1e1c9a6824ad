"""What goes into a trial's process and what comes out of it, whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address
from safetensors import SafetensorError

from bilora_ray.errors import TrialFailure, UserError, first_line
from bilora_ray.training.folder import TrialFolder

# The keys of a task.
NUMBER, FOLDER, SETTINGS, RESOURCES = "number", "folder", "settings", "resources"
# The key of a report: an evaluation's metrics; or why this trial cannot go on; or what is wrong with its settings or
# data; or what is wrong with the machine, so that the trial may go on another time.
EVALUATION, FAILURE, BAD_INPUT, BROKEN = "evaluation", "failure", "bad_input", "broken"
EXPECTED = (TrialFailure, UserError, OSError, SafetensorError)


def explained(error: BaseException) -> dict[str, str]:
    """The report of a trial that ended with one of the `EXPECTED` errors."""
    if isinstance(error, TrialFailure):
        return {FAILURE: str(error)}
    if isinstance(error, UserError):
        return {BAD_INPUT: str(error)}
    return {BROKEN: f"{type(error).__name__}: {first_line(error)}"}


def folder_of(task: Mapping[str, Any]) -> TrialFolder:
    """The trial's folder, which the search has made; OSError where it is not: a new one would be lost."""
    folder = TrialFolder(Path(task[FOLDER]))
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{folder.path} is not on node {get_node_ip_address()}; all nodes must share it")
    return folder
