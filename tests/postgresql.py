"""A real PostgreSQL server of a test's own, from Debian's package or whatever else has put one on the machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER, PASSWORD = "bilora", "planted-password"
PATIENCE_S = 30


class Server:
    """A server on 127.0.0.1 that can be killed and started again.

    Args:
        programs: folder of `postgres` and `initdb`.
        folder: of the data; the account that runs the server must own it.
        account: the server refuses to run as root.
    """

    def __init__(self, programs: Path, folder: Path, account: str | None) -> None:
        self._programs, self._folder, self._account = programs, folder, account
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        command = [programs / "initdb", "--auth=scram-sha-256", f"--username={USER}", f"--pwfile={secret}"]
        subprocess.run([*command, "--no-sync", folder / "data"], check=True, capture_output=True, user=account, cwd="/")
        self.start()

    @property
    def url(self) -> str:
        """Of the server's one database, with the password."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start, and wait until it answers."""
        settings = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder), "-c", "fsync=off"]
        with (self._folder / "log").open("ab") as log:
            command = [self._programs / "postgres", "-D", self._folder / "data", *settings]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._account, cwd="/")
        deadline = time.monotonic() + PATIENCE_S
        ready = [self._programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, capture_output=True).returncode != 0:
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Cut all connections and end, as after a crash."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(PATIENCE_S)


@contextmanager
def server() -> Iterator[Server]:
    """A server for the block. Skips the test where there is no PostgreSQL, or none that may be run."""
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="bilora-postgres-"))
    account = None
    try:
        if os.geteuid() == 0:
            account = "postgres"
            shutil.chown(folder, account)
        running = Server(Path(found).resolve().parent, folder, account)
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
