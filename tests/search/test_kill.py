"""SIGKILL of the search at random moments, then --resume: nothing is lost, nothing is done twice."""

from __future__ import annotations

import random
import time
from pathlib import Path

import optuna
import pytest
from chaos.searches import Search, kill_searches
from chaos.soundness import assert_resumed, assert_sound
from tiny_trials import Tiny

KILLS = 5
ORPHAN_WAIT_S = 30


@pytest.mark.slow
def test_search_killed_five_times_finishes_each_trial_exactly_once(tmp_path: Path, tiny: Tiny) -> None:
    search = Search(tmp_path, tiny, num_trials=10, scheduler="asha")
    moments = random.Random(20261123)
    ended: dict[int, optuna.trial.FrozenTrial] = {}
    in_flight: dict[int, int] = {}
    try:
        for kill in range(KILLS):
            reports = search.reports()
            process = search.start(*(["--resume"] if kill else []))
            search.wait(process, lambda reports=reports: search.reports() > reports)
            time.sleep(moments.uniform(0.0, 1.5))
            assert process.poll() is None, search.log
            process.kill()
            process.wait()
            if kill % 2:  # else the next search begins while the workers of this one may still write
                for number in search.in_flight():
                    with search.trial(number).lock(ORPHAN_WAIT_S):
                        in_flight[number] = search.trial(number).state()["step"]
            for trial in search.trials():
                if trial.state.is_finished():
                    # What had ended before a kill is as it was after it.
                    assert ended.setdefault(trial.number, trial) == trial
        assert search.ends(search.start("--resume")) == 0, search.log
    finally:
        kill_searches()
    assert_sound(search)
    assert_resumed(search, in_flight)
    for number, trial in ended.items():
        assert search.study().study.trials[number] == trial
