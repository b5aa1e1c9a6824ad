"""Processes of trials and a whole node killed under a search: it ends by itself with every trial done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.nodes import Nodes, ray_processes
from chaos.searches import Search
from chaos.soundness import assert_resumed, assert_sound
from tiny_trials import Tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


def test_a_killed_trial_process_costs_no_other_trial_anything(tiny: Tiny, tmp_path: Path, nodes: Nodes) -> None:
    search = Search(tmp_path, tiny, nodes=nodes, max_steps=400, eval_steps=10)
    process = search.start()
    search.wait(process, lambda: search.has_checkpoint(0, 1))
    step = search.trial(0).state()["step"]
    search.trained_by(nodes.processes("ImplicitFunc"))[0].kill()
    assert search.ends(process) == 0, search.log
    assert_sound(search)
    assert_resumed(search, {0: step})
    assert search.trial(1).state()["resumed_at"] == []


def test_a_lost_node_gives_its_trials_to_the_others(tiny: Tiny, tmp_path: Path, nodes: Nodes) -> None:
    options = ("--max-concurrent", "3")
    search = Search(tmp_path, tiny, nodes=nodes, options=options, num_trials=3, max_steps=400, eval_steps=10)
    other = nodes.add()
    process = search.start()
    search.wait(process, lambda: search.trained_by(ray_processes(other.pid, "ImplicitFunc")))
    lost = {number: search.in_flight()[number] for number in search.trained_by(ray_processes(other.pid, ""))}
    nodes.remove(other)
    assert search.ends(process) == 0, search.log
    assert_sound(search)
    assert_resumed(search, lost)


def test_a_trial_of_two_workers_outlives_its_controller_and_its_coordinator(
    tiny: Tiny, tmp_path: Path, nodes: Nodes
) -> None:
    search = Search(tmp_path, tiny, nodes=nodes, workers=2, num_trials=1, max_steps=400, eval_steps=10)
    process = search.start()
    steps = []
    for what in ("TrainController", "ImplicitFunc"):
        search.wait(process, lambda: search.in_flight().get(0, 0) > max(steps, default=0))
        steps.append(search.in_flight()[0])
        (victim,) = nodes.processes(what)
        victim.kill()
    assert search.ends(process) == 0, search.log
    assert_sound(search)
    assert len(search.trial(0).state()["resumed_at"]) == 2
    assert_resumed(search, {0: steps[-1]})
