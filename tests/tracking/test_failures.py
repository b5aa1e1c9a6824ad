"""What happens when MLflow, the network or the disk fails amid a search."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bilora_ray.records import Status
from bilora_ray.tracking.mlflow_tracker import default_uri

from .tracked import Project, evaluation, record


def test_run_that_is_deleted_while_its_trial_runs_is_made_again(project: Project, no_pause: None) -> None:
    tracker = project.open()
    tracker.trial_started(record())
    project.client.delete_run(project.trials()[0].info.run_id)
    tracker.trial_reported(record(), evaluation(10))
    tracker.trial_reported(record(), evaluation(20))
    assert project.steps(0) == [(10, 1 / 10), (20, 1 / 20)]
    assert len(project.said) == 2
    assert project.said[1] == "MLflow answers again; what it missed has been sent"


def test_trial_that_cannot_be_sent_holds_up_no_other(project: Project, no_pause: None) -> None:
    tracker = project.open()
    unsendable = record(0, Status.COMPLETE, value=0.1, settings={})
    records = [unsendable, *(record(number, Status.PRUNED) for number in range(1, 4))]
    for _ in range(2):
        tracker.reconcile(records)
    assert [project.trials()[number].info.status for number in range(1, 4)] == ["FINISHED"] * 3
    assert len(project.said) == 1


def test_ctrl_c_amid_a_call_leaves_no_second_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run = MlflowClient.create_run

    def interrupted(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        create_run(self, *args, **kwargs)
        raise KeyboardInterrupt

    tracker = project.open()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracker.trial_started(record())
    tracker.close([record(steps=1)], None, interrupted=True)
    assert project.trials()[0].data.tags["bilora_ray.status"] == "interrupted"
    assert project.steps(0) == [(10, 1 / 10)]


def test_disk_that_is_full_costs_no_trial(
    project: Project, adapter: Path, monkeypatch: pytest.MonkeyPatch, no_pause: None
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tracker = project.open()
    done = record(0, Status.COMPLETE, steps=3, value=0.1, adapter=adapter)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", full)
        for _ in range(3):
            tracker.trial_ended(done)
    expected = (
        "MLflow stopped answering (no space left on device); the search goes on, and what is missed is sent later"
    )
    assert project.said == [expected]
    tracker.close([done], 0, interrupted=False)
    assert project.said[1:] == ["MLflow answers again; what it missed has been sent"]
    assert len(project.artifacts(0)) == 2


@pytest.mark.parametrize("leaves_its_folder", [True, False])
def test_store_that_goes_away_is_not_made_anew(
    leaves_its_folder: bool, storage: Path, tmp_path: Path, no_pause: None
) -> None:
    place = tmp_path / "storage"
    shutil.copytree(storage, place)
    project = Project(default_uri(place), "away", place / "mlflow-artifacts")
    tracker = project.open()
    tracker.trial_started(record())
    # The connection to the file would outlive it; a failure makes the tracker connect again.
    tracker._runs = None
    away = place.rename(tmp_path / "away")
    if leaves_its_folder:
        place.mkdir()
    tracker.trial_reported(record(), evaluation(10))
    assert [path.name for path in tmp_path.rglob("*") if path.is_relative_to(place)] == ["storage"] * leaves_its_folder
    if leaves_its_folder:
        place.rmdir()
    away.rename(place)
    tracker.trial_reported(record(), evaluation(20))
    assert project.steps(0) == [(10, 1 / 10), (20, 1 / 20)]


def test_close_says_that_a_resume_sends_the_rest(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = project.open()
    monkeypatch.setattr(MlflowClient, "create_run", _refused)
    tracker.trial_started(record())
    tracker.close([record(0, Status.PRUNED)], None, interrupted=False)
    assert project.said[1:] == [
        "MLflow stopped answering (connection refused); `bilora-ray tune --resume` sends what is missing"
    ]


def test_nothing_is_called_during_the_pause(project: Project, counted: dict[str, int]) -> None:
    tracker = project.open()
    tracker.trial_ended(record(0, Status.COMPLETE, value=0.1, settings={}))
    counted.clear()
    tracker.trial_started(record(1))
    tracker.trial_reported(record(1), evaluation(10))
    assert counted == {}


def test_interrupt_leaves_no_run_running_and_ended_ones_as_they_are(project: Project, adapter: Path) -> None:
    tracker = project.open()
    tracker.trial_ended(record(0, Status.COMPLETE, steps=3, value=0.1, adapter=adapter))
    tracker.trial_started(record(1))
    tracker.trial_reported(record(1), evaluation(10))
    tracker.interrupt()
    assert "RUNNING" not in {run.info.status for run in project.runs()}
    statuses = {number: run.data.tags["bilora_ray.status"] for number, run in project.trials().items()}
    assert statuses == {0: "complete", 1: "interrupted"}
    parent = project.parent()
    assert (parent.info.status, parent.data.tags["bilora_ray.status"]) == ("KILLED", "interrupted")
    assert project.steps(1) == [(10, 1 / 10)]
    assert project.said == []


def test_interrupt_after_a_failure_ends_all_that_was_begun_here_and_no_more(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.open().trial_started(record(2))  # another process's, which tells of its own end
    tracker = project.open()
    tracker.trial_started(record(0))
    tracker.trial_started(record(1))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", _refused)
        tracker.trial_reported(record(1), evaluation(10))
    tracker.interrupt()
    statuses = {number: run.info.status for number, run in project.trials().items()}
    assert statuses == {0: "KILLED", 1: "KILLED", 2: "RUNNING"}
    assert project.parent().info.status == "KILLED"
    assert project.steps(1) == [(10, 1 / 10)]


@pytest.mark.parametrize("call", ["set_terminated", "search_runs"])
def test_interrupt_while_nothing_answers_is_one_line(
    call: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = project.open()
    tracker.trial_started(record())
    if call == "search_runs":
        tracker._runs = None  # as after a failure: it connects again
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, _refused)
        for _ in range(2):
            tracker.interrupt()
    assert project.said == [
        "MLflow stopped answering (connection refused); `bilora-ray tune --resume` sends what is missing"
    ]
    assert project.trials()[0].info.status == "RUNNING"
    tracker.interrupt()
    assert project.trials()[0].info.status == "KILLED"


def _refused(*_: object, **__: object) -> None:
    raise ConnectionRefusedError(111, "Connection refused")
