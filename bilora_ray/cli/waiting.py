"""What is being done while nothing else is said: shown on a terminal as it goes on, and in a log once it takes time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from bilora_ray.words import duration

# In a log: after so long a person wonders; and so often it is said again.
SOON_S, AGAIN_S = 3.0, 60.0


class Waiting:
    """What is being done now, and how far it is.

    Args:
        what: is being done, in words.
    """

    def __init__(self, what: str) -> None:
        self.now(what)

    def now(self, what: str) -> None:
        """From here on it is this."""
        self._what, self._began = what, time.monotonic()
        self._done = self._count = 0

    def counted(self, done: int, count: int) -> None:
        """So many of all are done."""
        self._done, self._count = done, count

    @property
    def what(self) -> str:
        """What is being done."""
        return self._what

    def __rich__(self) -> Text:
        """The line; drawn some times a second."""
        return Text(self.line(), style="dim")

    def line(self) -> str:
        """What is being done, how far it is and what is left by that."""
        spent = time.monotonic() - self._began
        parts = [self._what]
        if self._count:
            parts.append(f"{self._done} of {self._count}")
        parts.append(duration(spent))
        if 0 < self._done < self._count:
            parts.append(f"about {duration(spent / self._done * (self._count - self._done))} left")
        return ", ".join(parts)


@contextmanager
def waiting(what: str) -> Iterator[Waiting]:
    """Say on stderr, for the block, what is being done. Nothing is left of it on a terminal."""
    found = Waiting(what)
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with Live(found, console=console, refresh_per_second=4, transient=True):
            yield found
        return
    done = Event()
    teller = Thread(target=_tell, args=(found, done), daemon=True)
    teller.start()
    try:
        yield found
    finally:
        done.set()
        teller.join()


def _tell(found: Waiting, done: Event) -> None:
    told, again_at = "", 0.0
    while not done.wait(SOON_S):
        if found.what != told or time.monotonic() >= again_at:
            told, again_at = found.what, time.monotonic() + AGAIN_S
            click.echo(found.line(), err=True)
