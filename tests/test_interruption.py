"""How a process is asked to end: one line, the exit code that a shell expects, soon in any case."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from bilora_ray import interruption
from bilora_ray.interruption import Interrupted, heard, heeding_signals, leaving, noted

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
WAITS = """
import sys, time
from bilora_ray import interruption
interruption.PATIENCE_S, interruption.AGAIN_S = {patience}, {again}
with interruption.heeding_signals(), interruption.leaving("Interrupted; go on"):
    try:
        print("ready", flush=True)
        {body}
    finally:
        {close}
"""


def started(body: str, close: str = "pass", patience: float = 60, again: float = 1, **more: Any) -> Any:
    code = WAITS.format(body=body, close=close, patience=patience, again=again)
    command, streams = [sys.executable, "-c", code], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    process = subprocess.Popen(command, text=True, start_new_session=True, **streams)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_one_line_and_the_exit_code_that_a_shell_expects(number: signal.Signals) -> None:
    process = started("time.sleep(60)")
    process.send_signal(number)
    assert process.communicate() == ("", "Interrupted; go on\n")
    assert process.returncode == 128 + number


def test_the_same_signal_twice_at_once_is_one_and_what_is_open_closes() -> None:
    process = started("time.sleep(60)", close="time.sleep(0.5); print('closed')")
    process.send_signal(signal.SIGTERM)  # as `timeout` does: to the process, and to its group
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate() == ("closed\n", "Interrupted; go on\n")
    assert process.returncode == 143


@pytest.mark.parametrize(("patience", "again"), [(60, 0), (0.2, 60)], ids=["a second signal", "no end"])
def test_what_does_not_close_is_ended_with_the_same_line(patience: float, again: float) -> None:
    process = started(
        "time.sleep(60)", close="print('closes', flush=True); time.sleep(60)", patience=patience, again=again
    )
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "closes\n"
    if again == 0:
        process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "Interrupted; go on\n")
    assert process.returncode == 130


def test_who_swallows_the_first_signal_is_ended_all_the_same() -> None:
    body = "exec('while True:\\n try: time.sleep(9)\\n except BaseException: pass')"
    process = started(body, patience=0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "Interrupted; go on\n")
    assert process.returncode == 143


def test_what_fails_because_of_a_signal_is_not_told() -> None:
    process = started("time.sleep(60)", close="raise OSError('the terminal is gone')")
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "Interrupted; go on\n")
    assert process.returncode == 143


def test_a_terminal_that_is_closed_hides_no_exit_code() -> None:
    ours, theirs = pty.openpty()
    process = started("time.sleep(60)", close="print('closed', file=sys.stderr, flush=True)", stderr=theirs)
    os.close(theirs)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 129


def test_what_is_started_deaf_to_a_signal_stays_deaf() -> None:
    deaf: Callable[[], object] = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731 - as nohup does
    process = started("time.sleep(0.5)", preexec_fn=deaf)
    process.send_signal(signal.SIGHUP)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_forked_child_tells_its_own_signals_to_nobody() -> None:
    child = "signal.signal(15, lambda *_: os._exit(0)), print('up', flush=True), time.sleep(60)"
    body = f"import os, signal; pid = os.fork() or ({child}); os.waitpid(pid, 0); time.sleep(0.5)"
    process = started(body, patience=0.1)
    assert process.stdout.readline() == "up\n"
    (forked,) = psutil.Process(process.pid).children()
    forked.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_forked_child_is_deaf_to_no_signal() -> None:
    body = """import os
        with interruption.noted():
            pid = os.fork()
            for _ in range(0 if pid else 2):
                try:
                    os.kill(os.getpid(), 15)
                    time.sleep(5)
                    os._exit(1)
                except KeyboardInterrupt:
                    pass
            if not pid:
                os._exit(7)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    process = started(body)
    assert process.communicate() == ("", "")
    assert process.returncode == 7


def test_who_takes_note_hears_of_it_and_nothing_is_raised() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with heeding_signals(), noted():
        assert heard() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert heard() == signal.SIGTERM
    assert heard() is None
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_without_a_command_line_the_first_ctrl_c_is_noted_and_the_second_raised() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noted():
        signal.raise_signal(signal.SIGINT)
        assert heard() == signal.SIGINT
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_none_of_a_threads_affairs() -> None:
    def use() -> None:
        with heeding_signals(), noted():
            done.append(heard())

    done: list[int | None] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done == [None]


def test_an_error_without_a_signal_is_the_errors_own() -> None:
    with heeding_signals(), pytest.raises(OSError, match="full"), leaving():
        raise OSError("full")
    assert interruption.PATIENCE_S + 1 < 10
