"""Some of the searches that `python -m chaos.signals` stops and kills."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.searches import Search
from chaos.signals import stop
from chaos.soundness import assert_sound
from tiny_trials import Tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("phase", "name"),
    [("importing", "INT"), ("starting", "TERM"), ("running", "INT"), ("running", "HUP"), ("running", "KILL")],
)
def test_a_signal_to_the_group_leaves_all_in_order(phase: str, name: str, tiny: Tiny, tmp_path: Path) -> None:
    search = Search(tmp_path / "search", tiny, max_steps=100)
    found = stop(search, phase, name, group=True)
    assert [problem for problem in found.problems(name) if not problem.startswith("took")] == [], search.log
    again = search.start(*(["--resume"] if search.trials() else []))
    assert search.ends(again) == 0, search.log
    assert_sound(search)
