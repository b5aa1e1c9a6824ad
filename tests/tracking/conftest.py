"""A SQLite store of MLflow that all tests of this folder share: it takes seconds to make. Each has its own project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from bilora_ray.tracking import guard
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri
from bilora_ray.tracking.records import Status, TrialRecord
from bilora_ray.tracking.store import ENVIRONMENT

STUDY = "fish"
SETTINGS = {"metric": "eval_loss", "method": "bilora", "rank": 8, "rho": 0.05, "lora_alpha": None}


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path whose mlflow.db has its tables."""
    folder = tmp_path_factory.mktemp("storage")
    Project(default_uri(folder), "first", folder / "mlflow-artifacts").open()
    return folder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after the test what a tracker adds to the environment."""
    for key in ENVIRONMENT:
        monkeypatch.setenv(key, "to be restored")
        monkeypatch.delenv(key)


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PAUSE_S", 0.0)


@pytest.fixture
def project(storage: Path, request: pytest.FixtureRequest) -> Project:
    """An MLflow experiment of the test's own."""
    return Project(default_uri(storage), request.node.name, storage / "mlflow-artifacts")


class Project:
    """An MLflow experiment: opens trackers in it, and reads back what they wrote."""

    def __init__(self, uri: str, name: str, artifact_root: Path) -> None:
        self.uri, self.name, self.artifact_root = uri, name, artifact_root
        self.said: list[str] = []

    def open(self, **changes: Any) -> MlflowTracker:
        arguments: dict[str, Any] = {
            "uri": self.uri,
            "project": self.name,
            "study_name": STUDY,
            "artifact_root": self.artifact_root,
            "study_tags": {},
            "study_params": {"model_name_or_path": "builtin:tiny", "max_steps": 30},
            "digests": {},
            "say": self.said.append,
        }
        return MlflowTracker.open(**{**arguments, **changes})

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name(self.name)
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id], max_results=1000))

    def parent(self) -> Run:
        (parent,) = (run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags)
        return parent

    def trials(self) -> dict[int, Run]:
        """Number -> run; fails if a number has two."""
        parent_id = self.parent().info.run_id
        runs = [run for run in self.runs() if run.data.tags.get("mlflow.parentRunId") == parent_id]
        trials = {int(run.data.tags["bilora_ray.trial"]): run for run in runs}
        assert len(trials) == len(runs)
        return trials

    def steps(self, number: int, metric: str = "eval_loss") -> list[tuple[int, float]]:
        """(step, value) of a trial's metric, as often as they were logged."""
        history = self.client.get_metric_history(self.trials()[number].info.run_id, metric)
        return sorted((point.step, point.value) for point in history)

    def artifacts(self, number: int, folder: str = "adapter") -> list[str]:
        return sorted(file.path for file in self.client.list_artifacts(self.trials()[number].info.run_id, folder))


def record(number: int = 0, status: Status = Status.RUNNING, steps: int = 0, **changes: Any) -> TrialRecord:
    """Trial `number` after so many evaluations, one every ten steps."""
    history = [evaluation(10 * (step + 1)) for step in range(steps)]
    fields: dict[str, Any] = {"settings": SETTINGS, "sampled": {"rho": 0.05}, "history": history, **changes}
    return TrialRecord(number, status, **fields)


def evaluation(step: int) -> dict[str, float]:
    return {"step": step, "max_steps": 30, "eval_loss": 1 / step}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter."""
    folder = tmp_path / "step-00000030"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    return folder
