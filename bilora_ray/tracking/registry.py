"""Adapters in MLflow's registry of models, by name, version and alias."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.addresses import masked
from bilora_ray.errors import UserError
from bilora_ray.tracking.guard import reason
from bilora_ray.tracking.models import Candidate, address_of, log_model
from bilora_ray.tracking.store import check_runs, connect
from bilora_ray.tracking.study_runs import PARENT, STUDY, TRIAL, StudyInfo

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


URI, VERSIONS = "MLFLOW_TRACKING_URI", "mlflow.modelVersions"


@dataclass(frozen=True)
class Registered:
    """A version of a model in the registry.

    Attributes:
        name: of the model.
        version: of it.
        model_id: of the LoggedModel that it is.
        is_new: whether it was made now.
    """

    name: str
    version: int
    model_id: str
    is_new: bool


def register(
    uri: str,
    project: str,
    artifact_root: Path,
    study: StudyInfo,
    candidate: Candidate,
    name: str,
    alias: str | None,
    description: str,
) -> Registered:
    """Make an adapter a version of the model `name`, unless it is one, and have `alias` name that version.

    Args:
        uri: MLflow tracking URI, of which the registry is.
        project: MLflow experiment.
        artifact_root: folder of the artifacts where the store is a SQLite file.
        study: whose adapter it is.
        candidate: the adapter.
        name: of the model, made if missing.
        alias: of the version; None: no alias is moved.
        description: of a version that is made, in Markdown.

    Raises:
        UserError: the study has no run there, the name or the alias will not do, or MLflow does not answer.
    """
    check_runs(uri)
    try:
        client, experiment_id = connect(uri, project, artifact_root)
        study_run, trial_run = _runs(client, experiment_id, study, candidate.number, uri)
        model = log_model(client, experiment_id, study_run, trial_run, candidate)
        found = _version(client, name, model.model_id)
        if found is None:
            with _asked_of_all(uri):
                made = client.create_model_version(
                    name,
                    address_of(model.model_id),
                    study_run,
                    tags={**candidate.served.facts, STUDY: study.name, TRIAL: str(candidate.number)},
                    description=description,
                    model_id=model.model_id,
                )
        version = int(made.version if found is None else found)
        _link(client, model, name, version)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
    except UserError:
        raise
    except Exception as error:  # its type depends on the store
        raise UserError(f"--mlflow-uri {masked(uri)}: nothing is registered ({reason(error)})") from None
    return Registered(name, version, model.model_id, found is None)


@contextmanager
def _asked_of_all(uri: str) -> Iterator[None]:
    """For the block, have `uri` be what MLflow asks for a model by its id: its client asks the URI of all there."""
    import mlflow

    before = os.environ.get(URI)  # which MLflow keeps equal to what a program has set
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        forget: Any = None
        mlflow.set_tracking_uri(forget)
        if before is not None:
            os.environ[URI] = before


def _runs(client: MlflowClient, experiment_id: str, study: StudyInfo, number: int, uri: str) -> tuple[str, str]:
    """The ids of the run of the study and of that of its trial."""
    wanted = {STUDY: study.name, **study.tags}
    found = client.search_runs(
        [experiment_id], " AND ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
    )
    for run in found:
        condition = f"tags.`{PARENT}` = '{run.info.run_id}' AND tags.`{TRIAL}` = '{number}'"
        for trial in client.search_runs([experiment_id], condition):
            return run.info.run_id, trial.info.run_id
    line = f"trial {number} of study '{study.name}' has no run there; `bilora-ray tune --resume` sends what is missing"
    raise UserError(f"--mlflow-uri {masked(uri)}: {line}")


def _link(client: MlflowClient, model: LoggedModel, name: str, version: int) -> None:
    """Have the page of a model name its versions in the registry, as a server of MLflow does by itself."""
    known = json.loads(model.tags.get(VERSIONS, "[]"))
    if not any((told.get("name"), str(told.get("version"))) == (name, str(version)) for told in known):
        client.set_logged_model_tags(
            model.model_id, {VERSIONS: json.dumps([*known, {"name": name, "version": version}])}
        )


def _version(client: MlflowClient, name: str, model_id: str) -> str | None:
    """The version of the model `name`, which is made if missing, that is `model_id`."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    return next((str(version.version) for version in versions if version.source == address_of(model_id)), None)
