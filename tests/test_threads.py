"""Who computes outside of a search uses the processors that are free, and no more than it is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bilora_ray import threads
from bilora_ray.threads import free_processors, quota, use_fitting_threads


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """One of eight processors, all of them free and ours."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 8.0, 8.0))
    for name in ("QUOTA", "QUOTA_1", "PERIOD_1"):
        monkeypatch.setattr(threads, name, tmp_path / name)
    return monkeypatch


@pytest.mark.parametrize(("load", "free"), [(0.2, 8), (2.8, 5), (8.0, 1), (40.0, 1)])
def test_what_others_keep_busy_is_left_to_them(machine: pytest.MonkeyPatch, load: float, free: int) -> None:
    machine.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert free_processors() == free


def test_only_what_the_process_may_use_counts(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert free_processors() == 2


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"QUOTA": "250000 100000\n"}, 3),
        ({"QUOTA": "max 100000\n"}, None),
        ({"QUOTA_1": "50000\n", "PERIOD_1": "100000\n"}, 1),
        ({"QUOTA_1": "-1\n", "PERIOD_1": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_kept_to(
    machine: pytest.MonkeyPatch, tmp_path: Path, texts: dict[str, str], found: int | None
) -> None:
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert quota() == found
    assert free_processors() == (found or 8)


@pytest.mark.parametrize(("said", "used"), [(None, 3), ("7", 6)])
def test_who_says_how_many_threads_there_are_is_believed(
    machine: pytest.MonkeyPatch, said: str | None, used: int
) -> None:
    machine.setattr(os, "getloadavg", lambda: (5.0, 0.0, 0.0))
    machine.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        machine.setenv("OMP_NUM_THREADS", said)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert use_fitting_threads() == used
    finally:
        torch.set_num_threads(before)


def test_a_training_that_goes_on_has_as_many_as_before_however_busy_it_has_made_the_machine(
    machine: pytest.MonkeyPatch,
) -> None:
    machine.setattr(os, "getloadavg", lambda: (8.0, 0.0, 0.0))
    machine.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        for begun_with, used in ((None, 1), (5, 5), (9, 6)):
            torch.set_num_threads(6)
            assert use_fitting_threads(begun_with) == used
    finally:
        torch.set_num_threads(before)
