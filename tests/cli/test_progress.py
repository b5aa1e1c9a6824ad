"""The picture of a search, drawn while what it shows changes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from bilora_ray.cli.progress import SearchProgress
from bilora_ray.records import Objective, Status, TrialRecord

TRIALS = 3000


def trial(number: int, status: Status) -> TrialRecord:
    return TrialRecord(number, status, {}, {"rho": 0.1, "rank": 8}, value=float(number))


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_threads")
def test_trials_may_start_and_end_while_it_is_drawn() -> None:
    progress = SearchProgress(TRIALS, Objective("eval_loss", greater_is_better=False))
    failures: list[BaseException] = []
    drawn = 0
    done = threading.Event()

    def draw() -> None:
        nonlocal drawn
        try:
            while not done.is_set():
                progress.__rich__()
                drawn += 1
        except BaseException as error:  # a thread would keep it to itself
            failures.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for number in range(TRIALS):
            progress.trial_started(trial(number, Status.RUNNING))
            if number >= 20:
                progress.trial_ended(trial(number - 20, Status.COMPLETE))
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert drawn > 0
    assert len(progress.ended) == TRIALS - 20
    assert len(progress.running) == 20


def test_what_ran_out_of_memory_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SearchProgress(2, Objective("eval_loss", greater_is_better=False))
    for number in range(2):
        for step in (1, 2):
            metrics = {"step": step, "max_steps": 2, "eval_loss": 1.0, "training_limit": 512}
            progress.trial_reported(trial(number, Status.RUNNING), metrics)
    line = "Note: trial 0: training passes of at most 512 positions: larger ones ran out of memory"
    assert capsys.readouterr().err.splitlines().count(line) == 1


@pytest.mark.parametrize(
    ("status", "more", "words"),
    [
        (Status.PRUNED, {"stopped_after": {"rows": 1440}}, "stopped early after 1,440 rows"),
        (Status.PRUNED, {"stopped_after": {"epochs": 0.25}}, "stopped early after 0.25 epochs"),
        (Status.PRUNED, {}, "stopped early"),
        (Status.COMPLETE, {"history": [{"step": 30, "max_steps": 90}]}, "complete at step 30/90, out of patience"),
        (Status.COMPLETE, {"history": [{"step": 90, "max_steps": 90}]}, "complete"),
    ],
)
def test_how_far_a_trial_came_is_said(
    status: Status, more: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = SearchProgress(2, Objective("eval_loss", greater_is_better=False))
    progress.trial_ended(replace(trial(0, status), **more))
    assert capsys.readouterr().err == f"1 of 2 trials done: trial 0 {words}, eval_loss 0\n"
