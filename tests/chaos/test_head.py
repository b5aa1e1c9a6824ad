"""The head of the cluster killed under a search: it ends by itself, and goes on with a new head."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.nodes import Nodes
from chaos.searches import IMPATIENT_COMMAND, Search
from chaos.soundness import assert_resumed, assert_sound, torn
from mlflow import MlflowClient
from tiny_trials import Tiny


@pytest.mark.slow
def test_a_lost_head_ends_the_search_with_its_line_and_a_new_one_finishes_it(tiny: Tiny, tmp_path: Path) -> None:
    with Nodes() as nodes:
        search = Search(tmp_path, tiny, nodes=nodes, max_steps=400, eval_steps=10, command=IMPATIENT_COMMAND)
        process = search.start()
        search.wait(process, lambda: search.has_checkpoint(0, 1))
        nodes.kill_head()
        in_flight = search.in_flight()
        assert search.ends(process) == 2, search.log
        line = f"Error: --ray-address {nodes.address}: the cluster stopped answering; start it again and go on with"
        assert f"{line} --resume\n" in search.log
        assert "Traceback" not in search.log
        assert list(torn(search)) == []
        client = MlflowClient(f"sqlite:///{search.runs / 'mlflow.db'}")
        runs = client.search_runs([client.get_experiment_by_name("bilora-ray").experiment_id])
        assert {run.info.status for run in runs} == {"KILLED"}

        nodes.start_head()
        assert search.ends(search.start("--resume")) == 0, search.log
    assert_sound(search)
    assert_resumed(search, in_flight)
