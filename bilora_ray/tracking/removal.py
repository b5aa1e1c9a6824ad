"""The runs of a study in MLflow, removed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_ray.addresses import masked
from bilora_ray.errors import UserError
from bilora_ray.tracking.guard import reason
from bilora_ray.tracking.store import SERVERS, connect
from bilora_ray.tracking.study_runs import PAGE, PARENT, STUDY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

# So many ids are given to one command line.
AT_ONCE = 500


def remove_runs(uri: str, project: str, artifact_root: Path, study_name: str, tags: Mapping[str, str]) -> int:
    """Remove the run of a study, and those of its trials.

    From a database they are gone with their artifacts. A server keeps what is deleted until whoever runs it calls
    `mlflow gc`.

    Args:
        uri: MLflow tracking URI.
        project: MLflow experiment.
        artifact_root: folder of the artifacts where the store is a SQLite file.
        study_name: name of the study.
        tags: those that the study's run must carry.

    Returns:
        How many runs.

    Raises:
        UserError: MLflow does not answer, or will not.
    """
    try:
        client, experiment = connect(uri, project, artifact_root)
        runs = _find(client, experiment, study_name, tags)
        for run in runs:
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
        if uri.partition("://")[0] not in SERVERS:
            _collect([run.info.run_id for run in runs], uri)
    except UserError:
        raise
    except Exception as error:  # its type depends on the store
        raise UserError(f"--mlflow-uri {masked(uri)}: the runs are not removed ({reason(error)})") from None
    return len(runs)


def _find(client: MlflowClient, experiment: str, study_name: str, tags: Mapping[str, str]) -> list[MlflowRun]:
    """The study's runs, the trials' first: who is killed amid this finds the rest by the study's own."""
    conditions = [f"tags.`{key}` = '{value}'" for key, value in {STUDY: study_name, **tags}.items()]
    parents = _search(client, experiment, " AND ".join(conditions))
    children = [
        run for parent in parents for run in _search(client, experiment, f"tags.`{PARENT}` = '{parent.info.run_id}'")
    ]
    return [*children, *parents]


def _search(client: MlflowClient, experiment: str, condition: str) -> list[MlflowRun]:
    from mlflow.entities import ViewType

    found: list[MlflowRun] = []
    token = None
    while True:
        page = client.search_runs([experiment], condition, ViewType.ALL, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _collect(run_ids: list[str], uri: str) -> None:
    """Have MLflow free what deleted runs hold; its own command does that, and it alone."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    for start in range(0, len(run_ids), AT_ONCE):
        ids = ",".join(run_ids[start : start + AT_ONCE])
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--run-ids", ids]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["mlflow gc failed"]
            raise RuntimeError(lines[-1])
