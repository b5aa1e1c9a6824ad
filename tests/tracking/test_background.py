"""MLflow told in a thread: who tells does not wait, nothing is lost, and what waits is sent together."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bilora_ray.records import Status
from bilora_ray.tracking.mlflow_tracker import BackgroundTracker
from bilora_ray.tracking.study_runs import StudyRuns

from .tracked import Project, evaluation, record

STEPS = [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]


class Server:
    """Stands between a tracker and MLflow: holds up each record of a trial until it may pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self.may_pass = threading.Event(), threading.Event()
        self.passed: list[int] = []
        sync = StudyRuns.sync

        def held_up(runs: StudyRuns, trial: Any) -> None:
            self.arrived.set()
            assert self.may_pass.wait(timeout=60)
            sync(runs, trial)
            self.passed.append(trial.number)

        monkeypatch.setattr(StudyRuns, "sync", held_up)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def tell_of_a_whole_trial(tracker: BackgroundTracker, adapter: Path) -> None:
    tracker.trial_started(record())
    for step, _ in STEPS:
        tracker.trial_reported(record(), evaluation(step))
    tracker.trial_ended(record(0, Status.COMPLETE, steps=3, value=0.01, adapter=adapter))


def test_who_tells_does_not_wait_and_what_waits_is_sent_together(
    project: Project, adapter: Path, server: Server
) -> None:
    tracker = project.open()
    background = BackgroundTracker(tracker)
    background.trial_started(record(1))
    assert server.arrived.wait(timeout=60)
    tell_of_a_whole_trial(background, adapter)  # and MLflow has not answered for the first
    assert server.passed == []
    server.may_pass.set()
    done = record(0, Status.COMPLETE, steps=3, value=0.01, adapter=adapter)
    tracker.close([done, record(1, steps=1)], 0, interrupted=True)
    assert server.passed.count(0) <= 2
    assert project.steps(0) == STEPS
    assert len(project.artifacts(0)) == 2
    tags = {number: run.data.tags["bilora_ray.status"] for number, run in project.trials().items()}
    assert tags == {0: "complete", 1: "interrupted"}


def test_nothing_that_was_told_is_lost_with_the_study_database(project: Project, adapter: Path, server: Server) -> None:
    tracker = project.open()
    background = BackgroundTracker(tracker)
    background.trial_started(record(1))
    assert server.arrived.wait(timeout=60)
    tell_of_a_whole_trial(background, adapter)
    server.may_pass.set()
    tracker.interrupt()
    tags = {number: run.data.tags["bilora_ray.status"] for number, run in project.trials().items()}
    assert tags == {0: "complete", 1: "interrupted"}
    assert project.steps(0) == STEPS


def test_what_is_told_at_any_moment_is_sent_without_a_close(project: Project) -> None:
    background = BackgroundTracker(project.open())
    for number in range(5):
        background.trial_started(record(number))
        for step, _ in STEPS:
            background.trial_reported(record(number), evaluation(step))
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(timeout=60)
    assert [project.steps(number) for number in range(5)] == [STEPS] * 5


def test_a_dead_server_is_not_asked_again_and_again(
    project: Project, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    background = BackgroundTracker(project.open())
    monkeypatch.setattr(MlflowClient, "create_run", refused)
    counted.clear()
    for _ in range(20):
        background.trial_started(record())
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(timeout=60)
    assert len(project.said) == 1
    assert counted == {}
