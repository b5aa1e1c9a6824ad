"""A search as a job of a Ray cluster: handed in, followed, and how it ended."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import aiohttp
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from bilora_ray.errors import MachineError, UserError, first_line

CONNECT_S, ANSWER_S, UPLOAD_S = 5, 10, 300
# Ray kills a job 3 s after it asked it to stop; a search ends its trials and its runs in MLflow first.
STOP_WAIT_S = 60
# How long the log may be silent before the cluster is asked whether it is still there, and how long it may not answer.
SILENCE_S, PATIENCE_S = 15, 60
RECONNECT_S = 1
CONNECTION_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)
INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: Ray's word for it: SUCCEEDED, FAILED or STOPPED.
        exit_code: the command's own; 130 if the job was stopped, 1 if it never ran.
        problem: why it never ran.
    """

    status: str
    exit_code: int
    problem: str | None


class _Client(JobSubmissionClient):
    """Ray's client, which alone would wait for an answer without end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        patience = ANSWER_S if method == "GET" else UPLOAD_S
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, patience), **options)


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`.

    Raises:
        UserError: nothing answers there, something else does, or it refuses this client.
    """
    # Ray takes these two for truer than the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # Its modules set the level of their own loggers, so what they say is stopped where it is printed.
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    try:
        return _Client(address)
    except AuthenticationError as error:
        raise UserError(
            f"--address {address}: the cluster refuses this client ({first_line(error).partition('. ')[0]}); "
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except OSError as error:
        raise UserError(f"--address {address}: no Ray dashboard answers ({_cause(error)})") from None
    except (RuntimeError, LookupError, TypeError, ValueError):  # an answer, but not that of a dashboard
        raise UserError(f"--address {address}: what answers there is no Ray dashboard") from None


def _cause(error: BaseException) -> str:
    """What the operating system says beneath the errors of several libraries."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, HTTPException):
        return "what listens there does not speak HTTP"
    return getattr(error, "strerror", None) or first_line(error)


def submit(client: JobSubmissionClient, command: Sequence[str], folder: Path) -> str:
    """Upload `folder`, run `command` in it on the cluster, and return the job's id.

    Raises:
        UserError: the cluster does not take it.
        MachineError: it cannot be packed here, where the system keeps what is temporary.
    """
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    try:
        return client.submit_job(
            entrypoint=shlex.join(command), runtime_env={"working_dir": str(folder), "env_vars": environment}
        )
    except CONNECTION_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise MachineError(f"--working-dir {folder}: cannot be packed ({first_line(error)})") from None
        reason = _last_line(str(error) or type(error).__name__)
        raise UserError(f"--address {client.get_address()}: the cluster does not take the job ({reason})") from None


class Follower:
    """Follows a job.

    Args:
        client: of the job's cluster.
        job_id: the job's.
        write: is given the log, piece by piece.
    """

    def __init__(self, client: JobSubmissionClient, job_id: str, write: Callable[[str], None]) -> None:
        self.client = client
        self.job_id = job_id
        self.write = write
        self.written = 0
        self.heard = time.monotonic()
        self.job: JobDetails | None = None

    def follow(self) -> Outcome | None:
        """Write the job's log until the job has ended, each line once, over any number of connections.

        Returns:
            How it ended; None if the cluster has not answered for PATIENCE_S before that.
        """
        while time.monotonic() - self.heard < PATIENCE_S:
            with _connection():
                asyncio.run(self._tail())
            with _connection():
                if self._ended():
                    break
            time.sleep(RECONNECT_S)
        return _outcome(self.job) if self.job and self.job.status.is_terminal() else None

    async def _tail(self) -> None:
        """Write the log as it comes, on one connection, which begins with the log's first line."""
        stream, place = self.client.tail_job_logs(self.job_id), 0
        while True:
            piece = asyncio.ensure_future(anext(stream, None))
            while not (await asyncio.wait({piece}, timeout=SILENCE_S))[0]:
                # A connection that was cut without a word is silent too.
                if self._ended():
                    return
            text = piece.result()
            if text is None:
                return
            self._take(text, place)
            place += len(text)

    def _ended(self) -> bool:
        """Whether the job has ended; what the log holds by then is written."""
        self.job = self.client.get_job_info(self.job_id)
        self._take(self.client.get_job_logs(self.job_id), 0)
        return self.job.status.is_terminal()

    def _take(self, text: str, place: int) -> None:
        """Write what is new of `text`, which stands `place` characters after the log's beginning."""
        self.heard = time.monotonic()
        new = text[max(0, self.written - place) :]
        self.written += len(new)
        if new:
            self.write(new)


@contextmanager
def _connection() -> Iterator[None]:
    """Let the connection to the cluster break in the block."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what this process prints
        raise
    except CONNECTION_ERRORS:
        pass


def _outcome(job: JobDetails) -> Outcome:
    status, code = job.status.value, job.driver_exit_code
    if job.status == JobStatus.SUCCEEDED:
        return Outcome(status, 0, None)
    if job.status == JobStatus.STOPPED:
        return Outcome(status, INTERRUPTED, None)
    if code is None:
        return Outcome(status, 1, _last_line(job.message or "Ray does not say why"))
    # A command that was killed has the negative number of the signal.
    return Outcome(status, code if code > 0 else 128 - code, None)


def _last_line(text: str) -> str:
    """What an error of Ray's comes down to: the last line of a traceback."""
    return text.strip().splitlines()[-1]
