"""What a run was made with: the code's commit, the versions of libraries, the data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING

from bilora_ray import __version__

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

LIBRARIES = ("torch", "transformers", "peft", "ray", "optuna", "mlflow")
GIT_TIMEOUT_S = 5.0
# MLflow's limits on the two texts.
LONGEST_NAME, LONGEST_DIGEST = 500, 36


def provenance() -> dict[str, str]:
    """Tags of every run: source, library versions, and the commit of the current folder where it is a repository."""
    tags = {"mlflow.source.name": "bilora-ray", "mlflow.source.type": "LOCAL"}
    tags |= {f"bilora_ray.version.{library}": found for library, found in versions().items()}
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


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def dataset_inputs(digests: Mapping[str, str]) -> list[DatasetInput]:
    """The data as MLflow's pages list it.

    Args:
        digests: source (absolute path, Hub name or `builtin:NAME`) -> digest of its content.
    """
    from mlflow.entities import Dataset, DatasetInput

    inputs = []
    for source, digest in digests.items():
        kind, place = _source(source)
        name = PurePath(source).name[:LONGEST_NAME]
        inputs.append(DatasetInput(Dataset(name, digest[:LONGEST_DIGEST], kind, json.dumps(place))))
    return inputs


def _source(source: str) -> tuple[str, dict[str, str]]:
    """MLflow's name for a kind of source, and the source in the words of that kind."""
    if PurePath(source).is_absolute():
        return "local", {"uri": source}
    if ":" in source:
        return "code", {"uri": source}
    return "hugging_face", {"path": source}
