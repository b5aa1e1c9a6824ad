"""A Ray cluster of several nodes on this machine: each is a `ray start` in a process group of its own, to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
START_TIMEOUT_S = 120
# Without it a token that lies in the home folder would lock the searches of these tests out.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until something listens on `port` of this machine; `process` is to bring that about."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert process.poll() is None, f"{process.args} ended with code {process.returncode}"
            assert time.monotonic() < deadline, f"{process.args} does not listen"
            time.sleep(0.2)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to `process`, which leads a group, and to all below it, whatever group they are in."""
    below = children(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def children(pid: int) -> list[psutil.Process]:
    """All processes below `pid`."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ray_processes(pid: int, what: str) -> list[psutil.Process]:
    """The processes below `pid` that Ray calls `what`, such as ImplicitFunc, RayTrainWorker or TrainController."""
    found = []
    for process in children(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith(f"ray::{what}"):
                found.append(process)
    return found


class Nodes:
    """A cluster whose nodes a test kills. Stops all of them at the end of its `with` block.

    Args:
        cpus: of each node.
        gpus: that Ray is told of each node; there need not be any.
        others: nodes beside the head.
        dashboard: whether the head has one.
    """

    def __init__(self, cpus: int = 2, gpus: int = 0, others: int = 0, dashboard: bool = True) -> None:
        self.cpus = cpus
        self.gpus = gpus
        self.dashboard = dashboard
        self.port = free_port()
        self.head: subprocess.Popen[bytes] | None = None
        self.others: list[subprocess.Popen[bytes]] = []
        self._wanted = others
        # Ray's sockets lie in there, and their paths must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="bn-", dir="/tmp", ignore_cleanup_errors=True)

    def __enter__(self) -> Nodes:
        try:
            self.start_head()
            for _ in range(self._wanted):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._folder.cleanup()

    @property
    def address(self) -> str:
        """What `--ray-address` takes. A head that is started again has it too."""
        return f"127.0.0.1:{self.port}"

    def start_head(self) -> None:
        """Start the head, and wait until it listens."""
        ports = [f"--{what}-port={free_port()}" for what in ("dashboard", "ray-client-server")]
        options = ports if self.dashboard else [*ports, "--include-dashboard=false"]
        self.head = self._start("--head", f"--port={self.port}", f"--temp-dir={self._folder.name}", *options)
        wait_for_port(self.port, self.head)

    def add(self) -> subprocess.Popen[bytes]:
        """Start another node; the cluster hears of it some seconds later."""
        self.others.append(self._start(f"--address={self.address}"))
        return self.others[-1]

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node that is not the head."""
        self.others.remove(node)
        kill_group(node)

    def kill_head(self) -> None:
        """Kill the head. The other nodes live on for a minute, until they give it up."""
        assert self.head is not None
        kill_group(self.head)
        self.head = None

    def kill_all(self) -> None:
        """Kill all nodes."""
        for node in [*self.others, *([self.head] if self.head else [])]:
            kill_group(node)
        self.head, self.others = None, []

    def processes(self, what: str) -> list[psutil.Process]:
        """Those that Ray calls `what`, on all nodes."""
        nodes = [*self.others, *([self.head] if self.head else [])]
        return [process for node in nodes for process in ray_processes(node.pid, what)]

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        amounts = [f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}", f"--object-store-memory={100 * 1024**2}"]
        command = [RAY, "start", "--block", *amounts]
        with Path(self._folder.name, "nodes.log").open("ab") as log:
            return subprocess.Popen(
                [*command, f"--dashboard-agent-listen-port={free_port()}", *options],
                env={**os.environ, **ENVIRONMENT},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
