"""An MLflow experiment of a test's own, read back with MLflow's client, and records of trials to put in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.tracking.mlflow_tracker import MlflowTracker
from bilora_ray.tracking.study_runs import StudyInfo

STUDY = "fish"
SETTINGS = {"metric": "eval_loss", "method": "bilora", "rank": 8, "rho": 0.05, "lora_alpha": None}


def study_info(storage: Path, **changes: Any) -> StudyInfo:
    """What MLflow is told of a study, with `changes`."""
    fields: dict[str, Any] = {
        "name": STUDY,
        "tags": {},
        "params": {"model_name_or_path": "builtin:tiny", "max_steps": 30},
        "digests": {},
        "objectives": (Objective("eval_loss", greater_is_better=False),),
        "searched": ("rho",),
        "storage_path": storage,
        "report": storage / "report.html",
    }
    return StudyInfo(**{**fields, **changes})


class Project:
    """An MLflow experiment: opens trackers in it, and reads back what they wrote."""

    def __init__(self, uri: str, name: str, artifact_root: Path) -> None:
        self.uri, self.name, self.artifact_root = uri, name, artifact_root
        self.said: list[str] = []

    def open(self, **changes: Any) -> MlflowTracker:
        uri, artifacts = changes.pop("uri", self.uri), changes.pop("artifact_root", self.artifact_root)
        study = study_info(self.artifact_root.parent, **changes)
        return MlflowTracker.open(uri, self.name, artifacts, study, self.said.append)

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
