"""The MLflow server killed under a search and started again: the search goes on, the server misses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.nodes import free_port
from chaos.searches import Search
from chaos.soundness import assert_sound
from mlflow_server import Server
from tiny_trials import Tiny


@pytest.mark.slow
def test_a_search_outlives_its_mlflow_server_and_the_next_one_hears_of_all(tiny: Tiny, tmp_path: Path) -> None:
    with Server.of(tmp_path, free_port()) as server:
        search = Search(
            tmp_path / "search",
            tiny,
            num_trials=3,
            max_steps=1500,
            eval_steps=30,
            options=("--mlflow-uri", server.uri),
            mlflow_uri=server.uri,
        )
        process = search.start()
        search.wait(process, lambda: search.has_checkpoint(0, 1))
        server.kill()
        before = search.reports()
        search.wait(process, lambda: search.reports() >= before + 4)
        server.start()
        assert process.poll() is None, "the search was over before the server was back"
        assert search.ends(process) == 0, search.log
        assert_sound(search)
    assert "MLflow stopped answering (connection refused)" in search.log
    assert "MLflow answers again; what it missed has been sent" in search.log
