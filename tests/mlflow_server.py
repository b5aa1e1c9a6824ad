"""A real MLflow server on this machine, to be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from bilora_ray.tracking.mlflow_tracker import default_uri

START_TIMEOUT_S = 120


class Server:
    """A server that runs in its `with` block.

    Args:
        command: that starts it.
        environment: on top of this process's.
        port: of 127.0.0.1, where it is to listen.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], port: int) -> None:
        self.command = command
        self.environment = environment
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, storage: Path, port: int) -> Server:
        """MLflow's own, with its runs and artifacts in `storage`."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_uri(storage)]
        command += ["--artifacts-destination", str(storage / "uploads"), "--host", "127.0.0.1", "--port", str(port)]
        return cls([*command, "--workers", "1"], {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, port)

    @property
    def uri(self) -> str:
        """What `--mlflow-uri` takes."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to it and its workers: it ends without a goodbye."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True
