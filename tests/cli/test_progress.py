"""The picture of a search, drawn while what it shows changes."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.waiting import waiting
from bilora_ray.records import Moving, Objective, Status, TrialRecord

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


@pytest.mark.parametrize("has_best", [True, False])
def test_the_best_so_far_is_told_where_one_is_to_be_taken(has_best: bool) -> None:
    progress = SearchProgress(2, Objective("eval_loss", greater_is_better=False), has_best=has_best)
    progress.trial_ended(trial(0, Status.COMPLETE))
    console = Console(width=100, file=io.StringIO())
    console.print(progress)
    assert ("best so far" in console.file.getvalue()) is has_best  # type: ignore[attr-defined]


def moved(step: int, what: str = "training", seconds: float = 0.5) -> Moving:
    return Moving(what, step, max_steps=90, next_evaluation=30, step_seconds=seconds)


def test_a_log_hears_what_the_first_trial_loads_and_when_it_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SearchProgress(2, Objective("eval_loss", greater_is_better=False), starting="starting Ray")
    with progress:
        progress.trial_started(trial(0, Status.RUNNING))
        progress.trial_started(trial(1, Status.RUNNING))
        for moving in (Moving("reading the data"), Moving("loading the base model"), moved(1), moved(2), moved(3)):
            progress.trial_moves(0, moving)
            progress.trial_moves(1, moving)  # one of both will do
    assert capsys.readouterr().err.splitlines() == [
        "starting Ray",
        "0 of 2 trials done; running",
        "trial 0: reading the data",
        "trial 0: loading the base model",
        "trial 0: step 1/90, evaluates in 14 s",
    ]


def test_a_log_has_one_line_a_minute_on_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = SearchProgress(2, Objective("eval_loss", greater_is_better=False))
    progress.trial_started(trial(0, Status.RUNNING))
    progress.trial_moves(0, moved(1))
    capsys.readouterr()
    now = time.monotonic()
    monkeypatch.setattr("bilora_ray.cli.progress.time.monotonic", lambda: now)
    for step in range(2, 200):
        now += 1.0
        progress.trial_moves(0, moved(step, seconds=1.0))
    assert capsys.readouterr().err.count("\n") == 3
    progress.trial_moves(7, moved(1))  # one that has ended
    assert capsys.readouterr().err == ""


def test_the_picture_has_the_steps_between_evaluations() -> None:
    progress = SearchProgress(2, Objective("eval_loss", greater_is_better=False))
    progress.trial_started(trial(0, Status.RUNNING))

    def drawn() -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as found:
            console.print(progress)
        return found.get()

    assert "starting" in drawn()
    progress.trial_moves(0, Moving("loading the base model"))
    assert "loading the base model" in drawn()
    progress.trial_moves(0, moved(7))
    assert "step 7/90, evaluates in 12 s" in drawn()
    progress.trial_reported(trial(0, Status.RUNNING), {"step": 30, "max_steps": 90, "eval_loss": 1.0})
    assert "30/90" in drawn()  # until more is heard
    progress.trial_moves(0, moved(31))
    assert "step 31/90 " in drawn()


def test_what_takes_seconds_is_said_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not capsys: it loses what another thread writes while it reads.
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr("bilora_ray.cli.waiting.SOON_S", 0.01)
    monkeypatch.setattr("bilora_ray.cli.waiting.AGAIN_S", 1e9)

    def lines(count: int) -> list[str]:
        while log.getvalue().count("\n") < count:
            time.sleep(0.001)
        return log.getvalue().splitlines()

    with waiting("loading the base model") as doing:
        assert lines(1)[0].startswith("loading the base model, ")
        doing.now("measuring")
        assert lines(2)[1].startswith("measuring, ")
        doing.counted(1, 4)
        assert doing.line().startswith("measuring, 1 of 4, ")
    said = log.getvalue()
    monkeypatch.setattr("bilora_ray.cli.waiting.SOON_S", 600.0)
    with pytest.raises(ZeroDivisionError), waiting("nothing that takes long"):
        raise ZeroDivisionError
    assert log.getvalue() == said
