"""Following a job over connections that break: each line once, to the end, and what the end means."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobStatus

from bilora_ray.errors import UserError
from bilora_ray.search.cluster import submission
from bilora_ray.search.cluster.submission import Follower, Outcome

LOG = [f"line {number}\n" for number in range(6)]


class Cluster:
    """Stands for Ray's client. The job's log grows by a line with every connection and every question.

    Args:
        breaks: after how many lines each connection breaks, one after the other; later ones hold.
        ending: the job, once its log is complete.
        answers: whether anything is answered after those connections.
        silent: whether a connection that should break says nothing more instead.
    """

    def __init__(
        self, breaks: Sequence[int] = (), ending: Any = None, answers: bool = True, silent: bool = False
    ) -> None:
        self.breaks = list(breaks)
        self.ending = ending or job(JobStatus.SUCCEEDED, code=0)
        self.answers = answers
        self.silent = silent
        self.grown = 2

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        at_most = self.breaks.pop(0) if self.breaks else None if self.answers else 0
        for number, line in enumerate(LOG):
            if number == at_most:
                await (asyncio.sleep(3600) if self.silent else asyncio.sleep(0))
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            self.grown = max(self.grown, number + 1)
            yield line

    def get_job_info(self, job_id: str) -> Any:
        if not self.answers:
            raise ConnectionError("refused")
        self.grown += 1
        return self.ending if self.grown > len(LOG) else job(JobStatus.RUNNING)

    def get_job_logs(self, job_id: str) -> str:
        return "".join(LOG[: self.grown])


def job(status: JobStatus, code: int | None = None, message: str | None = None) -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "RECONNECT_S", 0)
    monkeypatch.setattr(submission, "SILENCE_S", 0.01)


def follow(cluster: Any) -> tuple[Outcome | None, str]:
    written: list[str] = []
    return Follower(cluster, "id", written.append).follow(), "".join(written)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("breaks", [(), (0,), (3,), (5,), (1, 0, 4), (2, 2, 2)])
def test_each_line_comes_once_over_any_number_of_connections(breaks: Sequence[int], silent: bool) -> None:
    assert follow(Cluster(breaks, silent=silent)) == (Outcome("SUCCEEDED", 0, None), "".join(LOG))


def test_a_piece_that_is_half_known_is_written_by_half() -> None:
    written: list[str] = []
    follower = Follower(Cluster(), "id", written.append)  # type: ignore[arg-type]
    for text, place in (("abc", 0), ("cd", 2), ("abcd", 0), ("", 4), ("e", 4)):
        follower._take(text, place)
    assert written == ["abc", "d", "e"]


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PATIENCE_S", 0.2)
    assert follow(Cluster([2], answers=False)) == (None, "".join(LOG[:2]))


def test_nobody_who_reads_is_no_broken_connection() -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Follower(Cluster(), "id", write).follow()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (job(JobStatus.SUCCEEDED, code=0), Outcome("SUCCEEDED", 0, None)),
        (job(JobStatus.STOPPED), Outcome("STOPPED", 130, None)),
        (job(JobStatus.FAILED, code=2, message="failed with exit code 2"), Outcome("FAILED", 2, None)),
        (job(JobStatus.FAILED, code=130), Outcome("FAILED", 130, None)),
        (job(JobStatus.FAILED, code=-9), Outcome("FAILED", 137, None)),
        (job(JobStatus.FAILED, message="Traceback:\n  there\nOSError: no"), Outcome("FAILED", 1, "OSError: no")),
        (job(JobStatus.FAILED), Outcome("FAILED", 1, "Ray does not say why")),
    ],
    ids=lambda part: str(part)[:40],
)
def test_how_it_ended(ending: Any, outcome: Outcome) -> None:
    assert follow(Cluster(ending=ending))[0] == outcome


class Refusing:
    """Stands for Ray's client, which packs a folder and sends it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def submit_job(self, **_: object) -> str:
        raise self.error

    def get_address(self) -> str:
        return "http://head:8265"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/job.zip"),
            "--working-dir /work: cannot be packed (No space left on device: /tmp/job.zip)",
        ),
        (
            requests.exceptions.ConnectionError("no route"),
            "--address http://head:8265: the cluster does not take the job (no route)",
        ),
        (
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            "--address http://head:8265: the cluster does not take the job ([Errno 104] Connection reset by peer)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_full_disk_here_is_told_from_a_cluster_that_does_not_take_the_job(error: Exception, line: str) -> None:
    client: Any = Refusing(error)
    with pytest.raises(UserError) as caught:
        submission.submit(client, ["bilora-ray"], Path("/work"))
    assert str(caught.value) == line
