"""`bilora-ray ui` serves this machine only, as SECURITY.md promises."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from chaos.nodes import children, free_port
from mlflow_server import Server

from bilora_ray.records import Objective
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri
from bilora_ray.tracking.study_runs import StudyInfo

COMMAND = Path(sys.executable).with_name("bilora-ray")


def listening(pid: int) -> set[tuple[str, int]]:
    """Address and port of every socket that the process, or one below it, listens at."""
    connections = [each for process in (psutil.Process(pid), *children(pid)) for each in process.net_connections()]
    return {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}


def test_ui_listens_on_the_loopback_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs, port = tmp_path / "runs", free_port()
    study = StudyInfo("s", {}, {}, {}, (Objective("eval_loss", False),), (), runs, runs / "report.html")
    MlflowTracker.open(default_uri(runs), "p", runs / "mlflow-artifacts", study, print)
    with Server([str(COMMAND), "ui", "--storage-path", str(runs), "--port", str(port)], {}, port) as server:
        assert server.process is not None
        assert listening(server.process.pid) == {("127.0.0.1", port)}
