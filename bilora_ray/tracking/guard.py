"""What keeps a search going while MLflow does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bilora_ray.addresses import masked

# A dead server costs the search one timeout in this many seconds, not one a call.
PAUSE_S = 30.0
LONGEST_REASON = 200


class Guard:
    """A circuit breaker: after a failure there is a pause, and a person hears of it once, not at every call.

    Args:
        say: shows one line to a person.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._retry_at = 0.0
        self._said: str | None = None

    def ready(self) -> bool:
        """Whether no pause is on."""
        return time.monotonic() >= self._retry_at

    @contextmanager
    def attempt(self, otherwise: str) -> Iterator[None]:
        """Run the block; if it fails, swallow the error and begin a pause.

        Args:
            otherwise: what happens instead. Said with the error's reason, unless it was the last thing said.
        """
        try:
            yield
        except Exception as error:  # HTTP, SQL, disk, or a bug of a server's: none may cost a search its trials
            self._retry_at = time.monotonic() + PAUSE_S
            if self._said != otherwise:
                self._said = otherwise
                self._say(f"MLflow stopped answering ({reason(error)}); {otherwise}")
        else:
            self._retry_at = 0.0
            if self._said is not None:
                self._said = None
                self._say("MLflow answers again; what it missed has been sent")


def reason(error: BaseException) -> str:
    """Why `error` happened, in a few words: the operating system's, where it said any, else the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return "no answer in time"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[0].lower() + cause.strerror[1:]
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # MLflow names the URI that it asked.
    return masked(lines[0])[:LONGEST_REASON]
