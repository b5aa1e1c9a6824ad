"""Every search leaves a page behind, however it ends; and none is lost for want of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import SPACE, curve

from bilora_ray.records import Status
from bilora_ray.search import session as sessions
from bilora_ray.search.simulated import simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study

STUDY = "s"


class Watcher:
    """Hears what is said of a search."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, records: list[Any]) -> None: ...

    def say(self, line: str) -> None:
        self.said.append(line)


@contextmanager
def searching(folder: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> Iterator[sessions.Session]:
    """A search of three trials, tracked by nobody."""
    nobody = SimpleNamespace(close=lambda *_: None)
    monkeypatch.setattr(sessions.MlflowTracker, "open", lambda *_, **__: nobody)
    space = load_space(None, [*SPACE, f"study.name={STUDY}", "study.num_trials=3"])
    with sessions.session(space, Layout(folder), None, {}, watcher) as running:  # type: ignore[arg-type]
        yield running


def test_a_search_that_ends_leaves_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher()
    with searching(tmp_path, watcher, monkeypatch) as running:
        simulate(running.study, curve)
    page = Layout(tmp_path).report(STUDY).read_text(encoding="utf-8")
    assert "still running" not in page
    assert "transformers" in page  # the versions
    assert load_study(Layout(tmp_path), STUDY).made_with["torch"]
    assert watcher.said == []
    assert [path.name for path in (tmp_path / "studies/s").glob("*report*")] == ["report.html"]


def test_one_that_ctrl_c_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        with searching(tmp_path, Watcher(), monkeypatch) as running:
            assert running.study.next_trials()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    page = Layout(tmp_path).report(STUDY).read_text(encoding="utf-8")
    assert "1 interrupted of 3" in page
    assert "still running" not in page


def test_no_search_is_lost_for_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher()
    monkeypatch.setattr("bilora_ray.report.page.page", lambda _: 1 / 0)
    with searching(tmp_path, watcher, monkeypatch) as running:
        simulate(running.study, curve)
    assert watcher.said == ["Note: there is no page of the study (division by zero); `bilora-ray report s` tries again"]
    assert {record.status for record in load_study(Layout(tmp_path), "s").records()} <= {Status.COMPLETE, Status.PRUNED}
