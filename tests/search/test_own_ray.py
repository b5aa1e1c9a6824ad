"""The cluster that a search starts for itself: nobody on another machine reaches it, and nobody without its token."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray._private import worker
from ray.tune.execution import class_cache
from tiny_trials import Tiny

from bilora_ray.errors import UserError
from bilora_ray.records import Status, TrialRecord
from bilora_ray.search.cluster.cluster import cluster
from bilora_ray.search.cluster.own_ray import check_room, kill_monitor
from bilora_ray.search.run import environment_inherited, run_trials
from bilora_ray.search.session import Observers
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study

JOIN = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print("nodes", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
except AuthenticationError:
    print("refused")
"""
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.mark.slow
def test_each_cluster_has_a_token_of_its_own_and_leaves_environment_and_files_as_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not ray.is_initialized()
    users_file = tmp_path / ".ray" / "auth_token"
    users_file.parent.mkdir()
    users_file.write_text("theirs")
    users_file.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    tokens = set()
    for _ in range(2):
        before = {key: os.environ.get(key) for key in (*AUTH, "GLOO_SOCKET_IFNAME")}
        with cluster(None):
            assert ray.get(ray.remote(lambda: os.getpid()).remote()) > 0
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
        assert {key: os.environ.get(key) for key in before} == before
    assert len(tokens - {"mine", "theirs"}) == 2
    assert (users_file.read_text(), users_file.stat().st_mode & 0o777) == ("theirs", 0o644)


@pytest.mark.slow
def test_a_trial_gets_a_process_that_has_started_already_and_tune_is_left_as_it_was() -> None:
    before = set(class_cache.ENV_VARS_TO_PROPAGATE), dict(class_cache.DEFAULT_ENV_VARS)

    class Trial:
        def process(self) -> int:
            return os.getpid()

    with cluster(None):
        while not (started := {process.pid for process in psutil.Process().children(recursive=True)} & idle()):
            time.sleep(0.2)
        with environment_inherited():
            trial = class_cache._ActorClassCache().get(Trial).options(num_cpus=1).remote()
            assert ray.get(trial.process.remote()) in started
    assert before == (class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS)


def idle() -> set[int]:
    """The processes of Ray's on this machine that wait for work."""
    return {process.pid for process in psutil.process_iter(["name"]) if process.info["name"].startswith("ray::IDLE")}


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["one worker", "several workers"]
)
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """How many workers the trials of the running cluster have. It was started by a user without any Ray files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with cluster(None, nested=request.param):
            yield 2 if request.param else 1


def listeners() -> dict[str, str]:
    """Address -> process, of everything that this process and its descendants listen on."""
    own = psutil.Process()
    names = {process.pid: process.name() for process in (own, *own.children(recursive=True))}
    return {
        f"{found.laddr.ip}:{found.laddr.port}": names[found.pid]
        for found in psutil.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.pid in names
    }


def open_to_others(found: Mapping[str, str]) -> dict[str, str]:
    hosts = {place: ipaddress.ip_address(place.rpartition(":")[0].removeprefix("::ffff:")) for place in found}
    return {place: found[place] for place, host in hosts.items() if not host.is_loopback}


class Watch:
    """Looks at what listens at each report."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def trial_started(self, trial: TrialRecord) -> None:
        pass

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        self.seen |= listeners()

    def trial_ended(self, trial: TrialRecord) -> None:
        pass


def test_all_that_listens_during_a_search_listens_on_the_loopback(workers: int, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", max_steps=4, eval_steps=2, per_device_train_batch_size=4)
    sections: dict[str, dict[str, Any]] = {
        "study": {"name": "s", "num_trials": 1, "scheduler": "none"},
        "trial": {**config.model_dump(exclude_unset=True), "rho": "{low: 0.01, high: 0.2}"},
        "resources": {"workers": workers},
    }
    space = load_space(None, [f"{name}.{key}={v}" for name, values in sections.items() for key, v in values.items()])
    study, watch = open_study(space, Layout(tmp_path / "runs"), {}), Watch()
    run_trials(study, Observers([watch]), 1)
    assert study.record(0).status is Status.COMPLETE, study.record(0).error
    processes = set(watch.seen.values())
    assert {"gcs_server", "raylet"} <= processes
    assert any("ImplicitFunc" in name for name in processes), processes
    assert any("RayTrainWorker" in name for name in processes) == (workers > 1)
    assert open_to_others(watch.seen) == {}


def test_what_listens_everywhere_is_found() -> None:
    for host in ("0.0.0.0", "::"):
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            place = f"{host}:{server.getsockname()[1]}"
            assert place in open_to_others(listeners())


def joined(environment: Mapping[str, str]) -> str:
    """What another process of this machine is told that would join the cluster."""
    clean = {key: value for key, value in os.environ.items() if key not in AUTH}
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True).stdout


def test_only_who_has_the_token_may_join(workers: int) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    assert joined({}) == "refused\n"
    assert joined({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}) == "refused\n"
    assert joined({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}) == "nodes 1\n"
    assert len(token) == 64


def test_the_token_is_in_no_file(workers: int) -> None:
    assert not Path.home().joinpath(".ray", "auth_token").exists()


def test_a_folder_without_room_for_rays_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check_room()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**19))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test of this process may have it running
    with pytest.raises(UserError) as caught, cluster(None):
        pass
    line = f"Ray does not start here: {tmp_path} has 0.5 MiB left for Ray's own files, which want 16 MiB"
    assert str(caught.value) == f"{line}; free some, or name another folder in TMPDIR"


@pytest.mark.parametrize(("slow", "starts"), [(2, 3), (9, 3)])
def test_a_node_that_is_slow_to_start_is_started_again(slow: int, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def init(**_: object) -> None:
        tried.append(1)
        if len(tried) <= slow:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    if slow < starts:
        with cluster(None):
            pass
    else:
        with pytest.raises(UserError, match=r"^Ray does not start here \(The current node timed out"), cluster(None):
            pass
    assert len(tried) == starts


def test_a_cluster_that_is_slow_to_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def init(**_: object) -> None:
        tried.append(1)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(UserError, match="no Ray cluster answers"), cluster("127.0.0.1:6379"):
        pass
    assert len(tried) == 1


@pytest.mark.parametrize(("runs", "killed"), [({"monitor": []}, [False]), ({"raylet": []}, [])])
def test_what_would_ask_a_cloud_for_nodes_is_killed_without_waiting(
    runs: dict[str, list[object]], killed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    node = SimpleNamespace(all_processes=runs, kill_monitor=lambda check_alive: seen.append(check_alive))
    monkeypatch.setattr(worker, "_global_node", node)
    kill_monitor()
    assert seen == killed


def test_a_process_that_started_no_cluster_has_nothing_to_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_global_node", None)
    kill_monitor()
