"""A cluster of two real Ray nodes, of which one has another file system mounted over a folder: what a search says."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from tiny_trials import Tiny

from bilora_ray.records import Status
from bilora_ray.runners import own_process, task
from bilora_ray.search.cluster.shared_storage import check_shared
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import study_names
from bilora_ray.search.study.studies import load_study

BIN = Path(sys.executable).parent
OTHER_MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class TwoNodes:
    """The cluster's address, the environment that holds its token, and the folder that only the head sees."""

    address: str
    environment: dict[str, str]
    unshared: Path

    def tune(self, space: Path, storage: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a search on the cluster."""
        command = [BIN / "bilora-ray", "tune", "--space", space, "--storage-path", storage]
        command += ["--ray-address", self.address, *options]
        environment = {**self.environment, **environment}
        return subprocess.run(command, cwd=space.parent, env=environment, capture_output=True, text=True, timeout=300)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _ready(log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    unshared = tmp_path_factory.mktemp("unshared")
    mount = [*OTHER_MOUNT, f"mount -t tmpfs none {shlex.quote(str(unshared))}"]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    host = ray.util.get_node_ip_address()
    port = _free_port(host)
    temp = tempfile.mkdtemp(prefix="br-", dir="/tmp")  # sockets need a short path
    start = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    head = [*start, "--head", f"--node-ip-address={host}", f"--port={port}", f"--temp-dir={temp}"]
    head += ["--include-dashboard=false", f"--ray-client-server-port={_free_port(host)}"]
    node = shlex.join([*start, f"--address={host}:{port}"])
    processes = []
    try:
        for name, command in (("head", head), ("node", [*mount[:-1], f"{mount[-1]} && exec {node}"])):
            log = unshared.parent / f"{name}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            processes.append(process)
            _ready(log, process)
        yield TwoNodes(f"{host}:{port}", environment, unshared)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def space(tiny: Tiny, tmp_path: Path) -> Path:
    settings = tiny.config("causal-lm", max_steps=4, eval_steps=2).model_dump(exclude_unset=True)
    lines = "".join(f"  {key}: {value}\n" for key, value in settings.items())
    file = tmp_path / "space.yaml"
    file.write_text(
        f"study: {{name: s, num_trials: 2, scheduler: none}}\ntrial:\n{lines}  rho: {{low: 0.01, high: 0.2}}\n"
    )
    return file


@pytest.mark.slow
def test_a_node_that_does_not_see_the_storage_is_named_and_nothing_is_begun(two_nodes: TwoNodes, space: Path) -> None:
    result = two_nodes.tune(space, two_nodes.unshared)
    host = two_nodes.address.partition(":")[0]
    assert result.stderr.endswith(
        f"Error: --storage-path {two_nodes.unshared}: must be a folder that all nodes of the cluster share; "
        f"these do not see it: {host}\n"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert study_names(Layout(two_nodes.unshared)) == []
    assert not list(two_nodes.unshared.glob("studies/*/trials/*"))
    assert not list(two_nodes.unshared.glob(".shared-*"))
    assert not (two_nodes.unshared / "mlflow.db").exists()


@pytest.mark.slow
def test_a_storage_that_both_nodes_see_is_used(two_nodes: TwoNodes, space: Path, tmp_path: Path) -> None:
    result = two_nodes.tune(space, tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    records = load_study(Layout(tmp_path / "runs"), "s").records()
    assert [record.status for record in records] == [Status.COMPLETE] * 2
    assert not list((tmp_path / "runs").glob(".shared-*"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_cluster_that_wants_another_token_says_so(
    mode: str, two_nodes: TwoNodes, space: Path, tmp_path: Path
) -> None:
    result = two_nodes.tune(space, tmp_path / "runs", "--insecure", RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN="0" * 64)
    *_, line = result.stderr.splitlines()  # Ray's own log is before it
    assert line == (
        f"Error: --ray-address {two_nodes.address}: the cluster wants its token; "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
    )
    assert "Traceback" not in result.stderr
    assert (result.returncode, study_names(Layout(tmp_path / "runs"))) == (2, [])


def test_a_cluster_of_one_node_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True}
    gone = {**one, "NodeID": "b", "Alive": False}
    monkeypatch.setattr(ray, "nodes", lambda: [one, gone])
    check_shared(tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_on_a_node_without_the_storage_says_so_and_makes_no_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    folder = tmp_path / "runs" / "studies" / "s" / "trials" / "0000"
    settings = tiny.config("causal-lm").model_dump()
    trial = {"number": 3, "folder": str(folder), "settings": settings}
    own_process.run_trial({"trials": [trial], "resources": {"gpus_per_worker": 0}})
    assert told[0].keys() == {task.NUMBER, task.BROKEN}
    assert told[0][task.NUMBER] == 3
    assert told[0][task.BROKEN].startswith(f"{folder} is not on node ")
    assert list(tmp_path.iterdir()) == []
