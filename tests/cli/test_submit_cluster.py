"""`bilora-ray submit` and `ray job submit` on a real Ray cluster that asks for a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny_trials import Tiny

from bilora_ray.records import Status
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study
from bilora_ray.search.study.view import StudyView

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SECRET = "hf_not_for_the_cluster"
# Long enough to be stopped before its end.
LONG = ("--num-trials=1", "--set=max_steps=300", "--set=eval_steps=10")


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and how to speak to it.

    Attributes:
        port: of its dashboard, on 127.0.0.1.
        token_file: holds its token.
    """

    port: int
    token_file: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def mlflow(self) -> str:
        """One database for all searches: making it takes seconds."""
        return f"--mlflow-uri=sqlite:///{self.token_file.parent}/mlflow.db"

    def environment(self, token_file: Path | None) -> dict[str, str]:
        """Of a client with that token; None: of one that has none."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        clean |= {"HF_TOKEN": SECRET, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        return clean | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)} if token_file else {})

    def start(self, folder: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
        """A client's command."""
        return subprocess.Popen(
            [BIN / words[0], *words[1:]],
            cwd=folder,
            env=self.environment(self.token_file),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def submit(self, folder: Path, *words: str, port: int | None = None) -> subprocess.Popen[str]:
        """`bilora-ray submit --follow`."""
        address = f"http://127.0.0.1:{port or self.port}"
        fixed = ("--address", address, "--space=space.yaml", f"--storage-path={folder / 'runs'}", "--follow")
        return self.start(folder, "bilora-ray", "submit", *fixed, self.mlflow, *words)

    def ask(self, method: str, path: str) -> Any:
        """What the cluster's jobs API answers."""
        token = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/{path}", headers=token, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def status(self, job_id: str) -> str:
        """Ray's word for the state of a job."""
        return self.ask("GET", job_id)["status"]

    def stop(self, job_id: str) -> None:
        """What `ray job stop` does, without the seconds in which that starts."""
        assert self.ask("POST", f"{job_id}/stop")["stopped"]
        while self.status(job_id) == "RUNNING":
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path("/tmp", f"bilora-{secrets.token_hex(4)}")  # short: Ray's sockets lie below it
    folder.mkdir(mode=0o700)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    names = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [*(f"{name}={port}" for name, port in ports.items()), f"--temp-dir={folder}/ray"]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    found = Cluster(ports["--dashboard-port"], token_file)
    environment = {key: value for key, value in found.environment(token_file).items() if key != "HF_TOKEN"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000", *options],
            env=environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(found, process, folder / "log")
        yield found
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(cluster: Cluster, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        with suppress(OSError):
            cluster.ask("GET", "")
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End what this module started, workers included, which have process groups of their own."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Cable:
    """Passes a port on to another, until it is pulled out and put in again."""

    def __init__(self, target: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._target = target
        self._ends: list[socket.socket] = []
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def pull(self) -> int:
        """Break all connections; how many there were."""
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        return len(ends) // 2

    def close(self) -> None:
        self._server.close()
        self.pull()


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A working folder: a space file, the model and the data that it names."""
    shutil.copytree(tiny.model("causal-lm"), tmp_path / "llama")
    for name in ("train", "validation"):
        shutil.copy(tiny.folder / f"texts-{name}.jsonl", tmp_path / f"{name}.jsonl")
    trial = {
        "model_name_or_path": "llama",
        "task": "causal-lm",
        "train_data": "train.jsonl",
        "validation_data": "validation.jsonl",
        "max_length": 64,
        "max_steps": 8,
        "eval_steps": 2,
        "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
    }
    study = {"name": "s", "num_trials": 2, "scheduler": "none"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"study": study, "trial": trial}))
    (tmp_path / ".rayignore").write_text("runs\n")
    return tmp_path


def study_in(folder: Path) -> StudyView:
    return load_study(Layout(folder / "runs"), "s")


def complete(folder: Path) -> bool:
    return {record.status for record in study_in(folder).records()} == {Status.COMPLETE}


def id_of(process: subprocess.Popen[str]) -> str:
    """The job's id, from the first line that --follow prints on stderr."""
    assert process.stderr is not None
    return process.stderr.readline().split()[1]


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob("runs/studies/s/trials/0000/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)


def test_a_search_is_followed_to_its_end_over_a_broken_connection(cluster: Cluster, folder: Path) -> None:
    cable = Cable(cluster.port)
    try:
        process = cluster.submit(folder, port=cable.port)
        job_id = id_of(process)
        wait_for_a_checkpoint(folder, process)
        assert cable.pull() > 0
        stdout, stderr = process.communicate()
    finally:
        cable.close()
    assert process.returncode == 0, stdout + stderr
    assert complete(folder)
    best = study_in(folder).best()
    assert best is not None
    # All of the job's log, and each line of it once.
    assert stdout == cluster.ask("GET", f"{job_id}/logs")["logs"]
    assert stdout.count("Running entrypoint") == stdout.count("Study 's': 2 trials") == 1
    assert f"Adapter  {best.adapter}\n" in stdout
    assert best.adapter is not None
    assert (best.adapter / "adapter_model.safetensors").is_file()
    # The adapter's base outlives the cluster.
    base = json.loads((best.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_relative_to(folder / "runs" / "inputs")
    environment = cluster.ask("GET", job_id)["runtime_env"]
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert SECRET not in json.dumps(environment) + stdout


def test_bad_data_is_told_by_the_job_with_its_code(cluster: Cluster, folder: Path) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"prompt": "no completion"}\n')
    process = cluster.submit(folder, "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 2
    told = json.loads(stdout)
    assert (told["status"], told["exit_code"], told["address"]) == ("FAILED", 2, cluster.address)
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert "train.jsonl, line 45: no column 'completion'" in line
    assert "Traceback" not in stderr
    assert not (folder / "runs").exists()


def test_a_stopped_search_goes_on_from_another_folder_with_the_printed_command(cluster: Cluster, folder: Path) -> None:
    process = cluster.submit(folder, *LONG)
    job_id = id_of(process)
    wait_for_a_checkpoint(folder, process)
    cluster.stop(job_id)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert "Interrupted; what is done is kept." in stdout
    line = stderr.splitlines()[-1]
    assert line.startswith(f"Job {job_id} was stopped; what is done is kept. Go on: ")
    assert "bilora-ray submit --address" in line
    assert line.endswith(" --resume")
    assert {record.status for record in study_in(folder).records()} == {Status.RUNNING}

    # Other content: Ray unpacks it in another folder.
    (folder / "notes.txt").write_text("new\n")
    process = cluster.submit(folder, *LONG, "--resume")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    assert complete(folder)
    assert study_in(folder).folder(0).state()["resumed_at"] != []


def test_ctrl_c_leaves_the_job_alone_and_ray_job_submit_goes_on_with_its_study(cluster: Cluster, folder: Path) -> None:
    process = cluster.submit(folder, *LONG)
    job_id = id_of(process)
    wait_for_a_checkpoint(folder, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    line = stderr.splitlines()[-1]
    ways = [f"ray job {verb} --address {cluster.address} {job_id}" for verb in ("logs --follow", "stop")]
    assert line == f"Detached; job {job_id} goes on. Follow: {ways[0]}  Stop: {ways[1]}"
    assert cluster.status(job_id) == "RUNNING"

    cluster.stop(job_id)
    assert cluster.status(job_id) == "STOPPED"
    words = ("bilora-ray", "tune", "--space=space.yaml", *LONG, f"--storage-path={folder / 'runs'}", "--resume")
    plain = ("ray", "job", "submit", "--address", cluster.address, "--working-dir=.", "--")
    process = cluster.start(folder, *plain, *words, "--ray-address=auto", cluster.mlflow)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    assert complete(folder)


@pytest.mark.parametrize(("token", "reason"), [(None, "Missing authentication token"), ("0" * 64, "Invalid auth")])
def test_a_client_without_the_token_is_refused(cluster: Cluster, folder: Path, token: str | None, reason: str) -> None:
    token_file = folder / "token" if token else None
    if token_file:
        token_file.write_text(str(token))
    done = subprocess.run(
        [BIN / "bilora-ray", "submit", "--address", cluster.address, "--space=space.yaml", "--storage-path=/shared"],
        cwd=folder,
        env=cluster.environment(token_file),
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(f"Error: --address {cluster.address}: the cluster refuses this client (")
    assert reason in line
