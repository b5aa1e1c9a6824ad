"""One MLflow run, written so that whatever is there already is neither written again nor changed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.records import Status
from bilora_ray.tracking.pages import NOTE
from bilora_ray.tracking.store import patience

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.entities import Run as MlflowRun

STATUS, EVALUATIONS = "bilora_ray.status", "bilora_ray.evaluations"
RUNNING, COMPLETE, INTERRUPTED = Status.RUNNING.value, Status.COMPLETE.value, Status.INTERRUPTED.value
MLFLOW_STATUS = {
    RUNNING: "RUNNING",
    COMPLETE: "FINISHED",
    Status.PRUNED.value: "FINISHED",
    Status.FAILED.value: "FAILED",
    INTERRUPTED: "KILLED",
}
# MLflow's limits: of the text of a param and of a tag, in characters, and of one request.
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
MOST_PARAMS, MOST_METRICS = 100, 1000

Point = tuple[str, int, float]  # of a metric: its name, the step, the value


class Run:
    """A run and what MLflow holds of it.

    Args:
        client: of the MLflow store.
        run: as MLflow returned it.

    Attributes:
        run_id: MLflow's.
        status: its status tag; None before it has one.
        evaluations: how many it held when it ended; None before that.
        live: whether it was begun, and not ended, through this object.
    """

    def __init__(self, client: MlflowClient, run: MlflowRun) -> None:
        self._client = client
        self.run_id: str = run.info.run_id
        self.status: str | None = run.data.tags.get(STATUS)
        self.evaluations = int(run.data.tags[EVALUATIONS]) if EVALUATIONS in run.data.tags else None
        self.live = False
        self._tags = dict(run.data.tags)
        self._params = set(run.data.params)
        self._metrics = set(run.data.metrics)
        self._logged: set[tuple[str, int]] | None = None

    @property
    def note(self) -> str:
        """What its page describes it by."""
        return self._tags.get(NOTE, "")

    def has_ended_as(self, status: str, evaluations: int) -> bool:
        """Whether it has ended with `status`, and holds that many evaluations."""
        return self.status == status != RUNNING and (self.evaluations is None or self.evaluations >= evaluations)

    def begin(self, params: Mapping[str, Any], tags: Mapping[str, str], datasets: list[DatasetInput]) -> None:
        """Set it RUNNING. A param that it has stays: MLflow lets none be changed."""
        from mlflow.entities import Param

        missing = [Param(key, as_param(value)) for key, value in params.items() if key not in self._params]
        for start in range(0, len(missing), MOST_PARAMS):
            self._client.log_batch(self.run_id, params=missing[start : start + MOST_PARAMS])
        self._params.update(params)
        if datasets:
            self._client.log_inputs(self.run_id, datasets=datasets)
        self._client.update_run(self.run_id, status=MLFLOW_STATUS[RUNNING])
        self.tag({**tags, STATUS: RUNNING})
        self.status, self.live = RUNNING, True

    def log(self, points: Iterable[Point]) -> None:
        """Log those of `points` that are finite and whose metric has no value at their step yet."""
        from mlflow.entities import Metric

        if self._logged is None:
            histories = (self._client.get_metric_history(self.run_id, key) for key in self._metrics)
            self._logged = {(metric.key, metric.step) for history in histories for metric in history}
        now_ms = int(time.time() * 1000)
        new = [
            Metric(key, float(value), now_ms, step)
            for key, step, value in points
            if (key, step) not in self._logged and _is_finite(value)
        ]
        for start in range(0, len(new), MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=new[start : start + MOST_METRICS])
        self._logged.update((metric.key, metric.step) for metric in new)

    def keep(self, folder: Path, name: str) -> None:
        """Copy the files of `folder` to the artifact folder `name`."""
        with patience():
            self._client.log_artifacts(self.run_id, str(folder), name)

    def keep_file(self, file: Path) -> None:
        """Copy `file` to the artifacts, in the place of an older one."""
        with patience():
            self._client.log_artifact(self.run_id, str(file))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set those of `tags` that it has not."""
        from mlflow.entities import RunTag

        new = {key: cut(text, LONGEST_TAG) for key, text in tags.items()}
        new = {key: text for key, text in new.items() if self._tags.get(key) != text}
        if new:
            self._client.log_batch(self.run_id, tags=[RunTag(key, text) for key, text in new.items()])
            self._tags.update(new)

    def untag(self, key: str) -> None:
        """Remove the tag `key`, if it is there."""
        if key in self._tags:
            self._client.delete_tag(self.run_id, key)
            del self._tags[key]

    def end(self, status: str, tags: Mapping[str, str], evaluations: int | None = None) -> None:
        """End it. The status tag is written last: a run that carries it holds all that there is to hold."""
        self._client.set_terminated(self.run_id, MLFLOW_STATUS[status])
        self.tag(tags if evaluations is None else {EVALUATIONS: str(evaluations), **tags})
        self.evaluations = evaluations
        self.tag({STATUS: status})
        self.status, self.live = status, False


def as_param(value: Any) -> str:
    """`value` as a space file would have it: null, true, 0.05, ["q_proj", "v_proj"]; text as it is."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return cut(text, LONGEST_PARAM)


def cut(text: str, longest: int) -> str:
    """`text`, or as much of it as `longest` characters hold, with a sign that there was more."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
