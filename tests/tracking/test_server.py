"""A real MLflow server, and its death in the middle of a search."""

from __future__ import annotations

import shutil
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from mlflow_server import Server

from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.tracking.mlflow_tracker import ui_command

from .tracked import Project, evaluation, record

pytestmark = pytest.mark.slow


def test_search_outlives_the_server_and_catches_up(
    storage: Path, tmp_path: Path, port: int, adapter: Path, no_pause: None
) -> None:
    # The tables are there, which saves the server the time to make them.
    shutil.copy(storage / "mlflow.db", tmp_path)
    project = Project(f"http://127.0.0.1:{port}", "served", tmp_path / "never")
    started = record(0)
    done = record(0, Status.COMPLETE, steps=3, value=0.01, adapter=adapter)
    with Server.of(tmp_path, port):
        tracker = project.open(digests={"builtin:fish": "ab12"})
        tracker.trial_started(started)
        tracker.trial_reported(started, evaluation(10))

    tracker.trial_reported(started, evaluation(20))
    tracker.trial_started(record(1))
    tracker.trial_reported(record(1), evaluation(10))
    tracker.trial_ended(done)
    assert project.said == [
        "MLflow stopped answering (connection refused); the search goes on, and what is missed is sent later"
    ]

    with Server.of(tmp_path, port):
        tracker.trial_reported(record(1), evaluation(20))
        assert project.said[1:] == ["MLflow answers again; what it missed has been sent"]
        assert project.steps(0) == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
        assert project.steps(1) == [(10, 1 / 10), (20, 1 / 20)]
        assert len(project.artifacts(0)) == 2
        assert project.trials()[0].inputs.dataset_inputs[0].dataset.name == "builtin:fish"
        tracker.close([done, record(1, Status.PRUNED, steps=2)], 0, interrupted=False)
        assert project.parent().info.status == "FINISHED"
        assert project.trials()[1].data.tags["bilora_ray.status"] == "pruned"
    assert not (tmp_path / "never").exists()
    tracker.close([done], 0, interrupted=False)
    tracker.interrupt()
    assert project.said[2:] == [
        "MLflow stopped answering (connection refused); `bilora-ray tune --resume` sends what is missing"
    ]


def test_ui_shows_runs_and_artifacts(project: Project, adapter: Path, port: int) -> None:
    project.open().close([record(0, Status.COMPLETE, value=0.1, adapter=adapter)], 0, interrupted=False)
    run_id = project.trials()[0].info.run_id
    query = urllib.parse.urlencode({"run_uuid": run_id, "path": "adapter/adapter_config.json"})
    with (
        Server(*ui_command(project.uri, port), port),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/get-artifact?{query}") as answer,
    ):
        assert answer.read() == b"{}"


def test_ui_of_a_server_is_its_own() -> None:
    with pytest.raises(UserError, match="open it in a browser"):
        ui_command("http://host:5000", 5001)
