"""Observers beside a search: none that is slow or broken costs it anything."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event, get_ident

import pytest

from bilora_ray.search.session import Aside, Observers
from bilora_ray.tracking.records import Status, TrialRecord

TRIAL = TrialRecord(0, Status.RUNNING, {}, {})
TOLD = ["started", "reported", "ended"]


class Slow:
    """Waits at each call until it may go on, and remembers the call and the thread."""

    def __init__(self) -> None:
        self.begun, self.go_on = Event(), Event()
        self.told: list[str] = []
        self.threads: set[int] = set()

    def trial_started(self, trial: TrialRecord) -> None:
        self._note("started")

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        self._note("reported")

    def trial_ended(self, trial: TrialRecord) -> None:
        self._note("ended")

    def _note(self, what: str) -> None:
        self.threads.add(get_ident())
        self.begun.set()
        assert self.go_on.wait(timeout=60)
        self.told.append(what)


class Broken(Slow):
    """Raises at each call."""

    def _note(self, what: str) -> None:
        self.told.append(what)
        raise RuntimeError("broken")


def tell_all(observer: Aside | Observers) -> None:
    observer.trial_started(TRIAL)
    observer.trial_reported(TRIAL, {"step": 1.0})
    observer.trial_ended(TRIAL)


def test_who_tells_does_not_wait_and_the_order_is_kept() -> None:
    slow = Slow()
    with ThreadPoolExecutor(max_workers=1) as thread:
        tell_all(Aside(slow, thread))
        assert slow.told == []  # it waits, and this thread is here already
        slow.go_on.set()
    assert slow.told == TOLD
    assert slow.threads.isdisjoint({get_ident()})


def test_what_waits_is_not_told_once_the_thread_is_shut_down() -> None:
    slow = Slow()
    with ThreadPoolExecutor(max_workers=1) as thread:
        aside = Aside(slow, thread)
        tell_all(aside)
        assert slow.begun.wait(timeout=60)
        thread.shutdown(wait=False, cancel_futures=True)
        slow.go_on.set()
        tell_all(aside)
    assert slow.told == TOLD[:1]


def test_an_observer_that_raises_is_told_no_more(caplog: pytest.LogCaptureFixture) -> None:
    broken, other = Broken(), Slow()
    other.go_on.set()
    with ThreadPoolExecutor(max_workers=1) as thread:
        tell_all(Observers([Aside(broken, thread), other]))
    assert (broken.told, other.told) == (TOLD[:1], TOLD)
    assert "an observer failed and is told no more" in caplog.text
