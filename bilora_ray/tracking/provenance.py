"""What a run was made with: the code's commit, the versions of libraries, the data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from bilora_ray import __version__

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

PACKAGE, VERSION = "bilora-ray", "bilora_ray.version."
LIBRARIES = ("torch", "transformers", "peft", "ray", "optuna", "mlflow")
GIT_TIMEOUT_S = 5.0
# What the data of a setting are for, in MLflow's words.
USES = {"train_data": "training", "validation_data": "validation", "test_data": "test", "retention_data": "retention"}
# MLflow's limits on the two texts.
LONGEST_NAME, LONGEST_DIGEST = 500, 36


def source() -> dict[str, str]:
    """What MLflow's pages call the source of a run: the program, and the commit of the current folder's repository."""
    tags = {"mlflow.source.name": PACKAGE, "mlflow.source.type": "LOCAL"}
    commit = _git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def versions() -> dict[str, str]:
    """Library -> version, of this package and of those that decide what a trial computes."""
    found = {"bilora-ray": __version__}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def version_tags() -> dict[str, str]:
    """The versions that a run was made with. A page lists tags in their order, so these come last."""
    return {VERSION + library: found for library, found in versions().items()}


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def dataset_inputs(digests: Mapping[str, str], settings: Mapping[str, Any]) -> list[DatasetInput]:
    """The data as MLflow's pages list it.

    Args:
        digests: source (absolute path, Hub name or `builtin:NAME`) -> digest of its content.
        settings: of all trials, which say what each source is for.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for source, digest in digests.items():
        kind, place = _source(source)
        name = PurePath(source).name[:LONGEST_NAME]
        used = ", ".join(use for key, use in USES.items() if settings.get(key) == source)
        tags = [InputTag("mlflow.data.context", used)] if used else []
        inputs.append(DatasetInput(Dataset(name, digest[:LONGEST_DIGEST], kind, json.dumps(place)), tags))
    return inputs


def _source(source: str) -> tuple[str, dict[str, str]]:
    """MLflow's name for a kind of source, and the source in the words of that kind."""
    if PurePath(source).is_absolute():
        return "local", {"uri": source}
    if ":" in source:
        return "code", {"uri": source}
    return "hugging_face", {"path": source}
