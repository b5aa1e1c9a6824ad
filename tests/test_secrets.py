"""Secrets of the environment and of URIs: a real search leaves them in no file and on no terminal."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from mlflow_server import Server
from tiny_trials import Tiny

from bilora_ray.cli.options import leaving_to_go_on

COMMAND = Path(sys.executable).with_name("bilora-ray")
START_TIMEOUT_S = 120
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD")
SPACE = """
study:
  name: s
  num_trials: 2
  scheduler: none
  points_to_evaluate: [{{learning_rate: 1.0e+30}}, {{learning_rate: 0.001}}]
trial:
{settings}
  max_grad_norm: null
  rho: {{low: 0.01, high: 0.2}}
  learning_rate: {{choice: [0.001, 1.0e+30]}}
resources: {{workers: {workers}}}
"""


def own_token(search: subprocess.Popen[str]) -> str:
    """The token of the cluster that the search has started, read from the raylet's environment."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert search.poll() is None, search.communicate()
        for process in psutil.Process(search.pid).children(recursive=True):
            try:
                if process.name() == "raylet":
                    return process.environ()["RAY_AUTH_TOKEN"]
            except (psutil.NoSuchProcess, KeyError):
                continue
        time.sleep(0.1)
    raise AssertionError("no raylet")


def leaks(folder: Path, planted: dict[str, str]) -> list[str]:
    """Which of the `planted` secrets are in which file below `folder`."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            found += [f"{name} in {file}" for name, value in planted.items() if value.encode() in content]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_writes_no_secret_anywhere(workers: int, tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny.config("causal-lm", max_steps=4, eval_steps=2).model_dump(
        exclude={"learning_rate", "rho"}, exclude_unset=True
    )
    lines = "\n".join(f"  {key}: {value}" for key, value in settings.items())
    (tmp_path / "space.yaml").write_text(SPACE.format(settings=lines, workers=workers))
    planted = {name: secrets.token_hex(16) for name in (*NAMES, "RAY_AUTH_TOKEN", "URI")}
    temp = Path(tempfile.mkdtemp(prefix="br-", dir="/tmp"))  # sockets need a short path
    environment = {**os.environ, **planted, "MLFLOW_TRACKING_USERNAME": "me", "RAY_TMPDIR": str(temp)}
    environment.pop("URI")
    try:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        # It asks nobody for a password, and takes one from who offers it.
        with Server.of(tmp_path, port):
            uri = f"http://me:{planted['URI']}@127.0.0.1:{port}"
            command = [COMMAND, "tune", "--space", "space.yaml", "--mlflow-uri", uri]
            search = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            planted["the cluster's token"] = own_token(search)
            stdout, stderr = search.communicate()
        assert search.returncode == 0, stderr
        for name in ("MLFLOW_TRACKING_PASSWORD", "URI"):
            planted[f"{name}, as HTTP sends it"] = base64.b64encode(f"me:{planted[name]}".encode()).decode()
        assert [name for name, value in planted.items() if value in stdout + stderr] == []
        # What was looked through is what there is: both trials, the server's database, the logs of Ray.
        assert len(list(tmp_path.glob("runs/studies/s/trials/*"))) == 2
        assert (tmp_path / "mlflow.db").stat().st_size > 0
        assert list(temp.rglob("gcs_server.out"))
        assert leaks(tmp_path, planted) == []
        assert leaks(temp, planted) == []
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def test_a_leak_is_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"\0\1abcdef\0")
    assert leaks(tmp_path, {"it": "cde", "other": "cdx"}) == [f"it in {tmp_path}/deep/file"]


def test_the_command_that_goes_on_shows_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "http://me:SECRET@host:5000"
    monkeypatch.setattr(sys, "argv", ["bilora-ray", "tune", "--mlflow-uri", uri, f"--study-database={uri}"])
    with pytest.raises(SystemExit), leaving_to_go_on():
        raise KeyboardInterrupt
    told = capsys.readouterr().err
    assert "SECRET" not in told
    assert told.count("http://me:***@host:5000") == 2
