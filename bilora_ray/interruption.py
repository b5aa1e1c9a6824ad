"""How a process is asked to end, by Ctrl-C or by a signal, and how it leaves: with one line and the signal's exit code.

The first signal is a KeyboardInterrupt, and what is open gets `PATIENCE_S` seconds to close. Another one, or the end of
that time, ends the process at once: the study database is the truth at any moment, so nothing is lost by it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

# Ctrl-C; a cluster, a service manager or `timeout`; a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# So long the process may take to end by itself. Nobody waits for ten seconds without doubt.
PATIENCE_S = 8.0
# Who signals a process and its group, as `timeout` does, signals it twice: that is one signal.
AGAIN_S = 1.0
SHOW_CURSOR = b"\x1b[?25h"
OVER = b"\0"


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to end.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Ear:
    """What was heard of the signals of one time.

    Args:
        watched: whether a thread sees to it that the process ends.
    """

    def __init__(self, watched: bool) -> None:
        self.watched = watched
        self.number: int | None = None
        self.told = self.noting = False
        self.line = "Interrupted"

    def hear(self, number: int, _: object) -> None:
        """Raise Interrupted, unless that was done before or is left to who takes note."""
        # The thread that watches may have set the number already.
        again, self.told, self.number = self.told, True, self.number or number
        if number == signal.SIGHUP:
            _let_go_of_the_terminal()
        if again and self.watched:
            return
        if again or not self.noting:
            raise Interrupted(number)

    def leave(self) -> NoReturn:
        """End the process now. What it has started for itself alone the system ends with it."""
        with suppress(OSError):
            os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + _told(self.line).encode())
        os._exit(128 + (self.number or signal.SIGINT))

    def watch(self, pipe: int) -> None:
        """Read the signals that the system writes to `pipe`, even where the main thread hears of none, until OVER."""
        ends_at: float | None = None
        while True:
            left = None if ends_at is None else max(0.0, ends_at - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                self.leave()
            for number in os.read(pipe, 64):
                if number == OVER[0]:
                    return
                if number not in SIGNALS:
                    continue
                if ends_at is None:
                    self.number, ends_at = self.number or number, time.monotonic() + PATIENCE_S
                elif time.monotonic() > ends_at - PATIENCE_S + AGAIN_S:
                    self.leave()


_ears: list[_Ear] = []


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Raise Interrupted in the block at the first of the SIGNALS, and have the process end soon after it in any case.

    A signal that the process was started deaf to, as by `nohup`, or by a script in the background, stays unheard.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are none of ours there
        yield
        return
    ear = _Ear(watched=True)
    here, there = os.pipe()
    os.set_blocking(there, False)
    watch = threading.Thread(target=ear.watch, args=(here,), name="signals", daemon=True)
    wakeup = signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    watch.start()
    try:
        with _hearing(ear, *SIGNALS):
            yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.write(there, OVER)
        watch.join()
        os.close(here)
        os.close(there)


@contextmanager
def noted() -> Iterator[None]:
    """In the block, take note of a signal and raise nothing: who runs it asks `heard`, and ends it where it can.

    Where the process heeds no signals, as in a notebook, Ctrl-C is taken note of, and a second one is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
    elif _ears:
        _ears[-1].noting = True
        try:
            yield
        finally:
            _ears[-1].noting = False
    else:
        ear = _Ear(watched=False)
        ear.noting = True
        with _hearing(ear, signal.SIGINT):
            yield


def heard() -> int | None:
    """The signal that asked the process to end, if one did."""
    return _ears[-1].number if _ears else None


@contextmanager
def leaving(line: str = "Interrupted") -> Iterator[None]:
    """Leave the process with `line` on stderr, and the exit code that a shell expects, if the block is interrupted.

    Once a signal has come, whatever else is raised in the block is a consequence of it, and not told.

    Raises:
        SystemExit: with 128 + the signal's number; 130 where another command asked for the end.
    """
    ear = _ears[-1] if _ears else _Ear(watched=False)
    before, ear.line = ear.line, line
    try:
        yield
    except KeyboardInterrupt as error:
        _leave(line, ear.number or (error.number if isinstance(error, Interrupted) else signal.SIGINT))
    except Exception:  # of whatever the signal has ended amid its work
        if ear.number is None:
            raise
        _leave(line, ear.number)
    finally:
        ear.line = before


@contextmanager
def _hearing(ear: _Ear, *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    _ears.append(ear)
    try:
        for number in heeded:
            signal.signal(number, ear.hear)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number] or signal.SIG_DFL)
        _ears.remove(ear)


def _leave(line: str, number: int) -> NoReturn:
    with suppress(OSError):
        sys.stderr.write(_told(line))
        sys.stderr.flush()
    sys.exit(128 + number)


def _told(line: str) -> str:
    """`line`, below the `^C` that a terminal shows."""
    with suppress(OSError):
        return f"\n{line}\n" if os.isatty(2) else f"{line}\n"
    return f"{line}\n"


def _let_go_of_the_terminal() -> None:
    """Write to nowhere what would go to a terminal that is closed, where each write is an error."""
    for output in (1, 2):
        try:
            os.write(output, b"")
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def _forget_in_a_child() -> None:
    """What is forked off, and is not another program, must not tell its own signals to this process."""
    if _ears:
        signal.set_wakeup_fd(-1)
    for ear in _ears:  # no thread watches here, and nobody asks what was heard: each signal is raised
        ear.watched = ear.noting = False


os.register_at_fork(after_in_child=_forget_in_a_child)
