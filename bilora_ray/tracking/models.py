"""Adapters as MLflow's models: a LoggedModel of a study's best, and versions of it in the registry.

The folder of a model holds the adapter, and the name of what loads it: see `release.served`.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.records import Served, TrialRecord
from bilora_ray.tracking.pages import NOTE, link
from bilora_ray.tracking.provenance import PACKAGE, versions
from bilora_ray.tracking.run import as_param
from bilora_ray.tracking.store import patience

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

TRIAL, ADAPTER = "bilora_ray.trial", "bilora_ray.adapter"
# So long one may be on its way into MLflow: another process, a search at its end, may be making it.
UPLOAD_S = 600.0
# What must be installed where a model is loaded, in the versions that are here.
REQUIRED = (PACKAGE, "torch", "transformers", "peft")
# MLflow allows none of these in the name of a model.
NOT_IN_A_NAME = str.maketrans(dict.fromkeys("/:.%\"'", "-"))


@dataclass(frozen=True)
class Candidate:
    """An adapter that becomes a model.

    Attributes:
        name: of the model.
        number: of its trial.
        adapter: the folder.
        sampled: the settings that the search chose.
        values: metric -> value of the adapter.
        served: what MLflow is told of it.
    """

    name: str
    number: int
    adapter: Path
    sampled: Mapping[str, Any]
    values: Mapping[str, float]
    served: Served


def candidate(study: str, trial: TrialRecord, served: Served) -> Candidate:
    """The adapter of a trial, which has one, as a model: of the name of its `study` and its number."""
    assert trial.adapter is not None
    values = trial.values or ({} if trial.value is None else {str(trial.settings["metric"]): trial.value})
    return Candidate(f"{study}-{trial.number:04d}", trial.number, trial.adapter, trial.sampled, values, served)


def log_model(
    client: MlflowClient, experiment_id: str, study_run: str, trial_run: str, wanted: Candidate
) -> LoggedModel:
    """The LoggedModel of an adapter, made if missing: of the study's run, and an output of its trial's run too.

    Raises whatever MLflow, the network or the disk raises.

    Args:
        client: of the MLflow store.
        experiment_id: of the study's project.
        study_run: id of the run of the study.
        trial_run: id of the run of the trial.
        wanted: the adapter.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    which = {TRIAL: str(wanted.number), ADAPTER: wanted.adapter.name}
    for found in models_of(client, experiment_id, study_run):
        if all(found.tags.get(key) == value for key, value in which.items()):
            if found.status == "READY":
                return found
            if time.time() - found.creation_timestamp / 1000 > UPLOAD_S:  # whoever made it was killed amid that
                client.delete_logged_model(found.model_id)
    params = {key: as_param(value) for key, value in wanted.sampled.items()}
    name, base = wanted.name.translate(NOT_IN_A_NAME), wanted.served.facts.get("base_model")
    trial = link(f"trial {wanted.number}", experiment_id, trial_run)
    study = link("its study", experiment_id, study_run)
    note = f"LoRA adapter of `{base}`, whose weights are not copied: {trial} of {study}"
    if wanted.served.kind == "model":
        note = f"`{base}`, fully fine-tuned: {trial} of {study}"
    made = client.create_logged_model(
        experiment_id, name, study_run, {**which, NOTE: note, **wanted.served.facts}, params, wanted.served.kind
    )
    try:
        with tempfile.TemporaryDirectory(prefix="bilora-ray-") as folder, patience():
            _write(Path(folder) / "model", wanted, made.model_id, study_run)
            client.log_model_artifacts(made.model_id, str(Path(folder) / "model"))
    except BaseException:  # Ctrl-C too: nothing half-made stays, and all is raised again
        client.delete_logged_model(made.model_id)
        raise
    for run_id in dict.fromkeys((study_run, trial_run)):
        client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
    now_ms = int(time.time() * 1000)
    metrics = [Metric(key, value, now_ms, 0, made.model_id) for key, value in wanted.values.items()]
    client.log_batch(study_run, metrics=metrics)
    return client.finalize_logged_model(made.model_id, "READY")


def address_of(model_id: str) -> str:
    """The URI by which MLflow loads a LoggedModel; of a version in the registry it is the source."""
    return f"models:/{model_id}"


def models_of(client: MlflowClient, experiment_id: str, study_run: str) -> list[LoggedModel]:
    """The models that the run of a study has made."""
    found: list[LoggedModel] = []
    token = None
    while True:
        condition = f"source_run_id = '{study_run}'"
        page = client.search_logged_models([experiment_id], condition, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _write(folder: Path, wanted: Candidate, model_id: str, run_id: str) -> None:
    """What MLflow loads, by itself: no pickle, no code, and not the base model's weights."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType

    served, found = wanted.served, versions()
    requirements = [f"{name}=={found[name].partition('+')[0]}" for name in REQUIRED if name in found]
    kind: Any = DataType.string if served.texts else AnyType()
    example = None if served.example is None else pandas.DataFrame([served.example])
    data = folder.with_name("adapter")
    served.write(data)
    answers: list[Any] = [ColSpec(kind, "prediction"), ColSpec(AnyType(), "probabilities", required=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no example, where there is none
        pyfunc.save_model(
            folder,
            loader_module=served.loader,
            data_path=str(data),
            mlflow_model=Model(artifact_path=wanted.name, run_id=run_id, model_id=model_id),
            signature=ModelSignature(Schema([ColSpec(kind, name) for name in served.inputs]), Schema(answers)),
            input_example=example,
            pip_requirements=requirements,
            metadata=dict(served.facts),
            model_config=dict(served.config),
        )
