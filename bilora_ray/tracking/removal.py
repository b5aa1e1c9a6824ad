"""The runs of a study in MLflow, removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_ray.addresses import masked
from bilora_ray.errors import UserError
from bilora_ray.tracking.guard import reason
from bilora_ray.tracking.models import address_of, models_of
from bilora_ray.tracking.pages import VIEW
from bilora_ray.tracking.store import SERVERS, connect
from bilora_ray.tracking.study_runs import PAGE, PARENT, STUDY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun


def remove_runs(uri: str, project: str, artifact_root: Path, study_name: str, tags: Mapping[str, str]) -> int:
    """Remove the run of a study, and those of its trials.

    From a database they are gone with their artifacts, and so are the models that they made, but for those that have a
    version in the registry. A server keeps what is deleted until whoever runs it calls `mlflow gc`.

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
        models = [model for run in runs if PARENT not in run.data.tags for model in _models(client, experiment, run)]
        for model in models:
            client.delete_logged_model(model.model_id)
        for run in runs:
            _forget_view(client, experiment, run.info.run_id)
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
        if uri.partition("://")[0] not in SERVERS:
            _collect(uri, runs, models)
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


def _models(client: MlflowClient, experiment: str, run: MlflowRun) -> list[LoggedModel]:
    """The models of a study's run that are not in the registry."""
    registered = {version.source for version in client.search_model_versions(f"run_id = '{run.info.run_id}'")}
    found = models_of(client, experiment, run.info.run_id)
    return [model for model in found if address_of(model.model_id) not in registered]


def _forget_view(client: MlflowClient, experiment: str, run_id: str) -> None:
    """Take a study from the views of its experiment's page."""
    if f"{VIEW}{run_id}" in client.get_experiment(experiment).tags:
        client.delete_experiment_tag(experiment, f"{VIEW}{run_id}")


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


def _collect(uri: str, runs: list[MlflowRun], models: list[LoggedModel]) -> None:
    """Free what deleted runs and models hold. `mlflow gc` would free what others have deleted too."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.tracking._tracking_service.utils import _get_store

    store = _get_store(uri)
    for model in models:
        get_artifact_repository(model.artifact_location).delete_artifacts()
        store._hard_delete_logged_model(model.model_id)
    for run in runs:
        get_artifact_repository(run.info.artifact_uri).delete_artifacts()
        store._hard_delete_run(run.info.run_id)
