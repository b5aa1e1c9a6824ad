"""A search in a notebook whose kernel is interrupted: it ends as by Ctrl-C, and the kernel goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import bilora_ray

ROOT = Path(__file__).resolve().parents[2]
BEFORE = """
import os, signal
import bilora_ray
from bilora_ray.library.surroundings import left_as_found
with left_as_found():  # what libraries set as they are imported is theirs
    pass
before = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
"""
SEARCH = """
bilora_ray.tune(
    "{space}", num_trials=2, max_concurrent=1, storage_path="{folder}",
    settings={{"num_train_epochs": 400, "eval_steps": 5, "study.scheduler": "none"}},
)
"""
AFTER = """
import ray
after = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print(ray.is_initialized(), after[1] == before[1], set(after[0].items()) ^ set(before[0].items()))
"""


def answer(client: Any, code: str, timeout: float = 300) -> tuple[str, str]:
    """The name of the error of a cell, if it raised one, and all that it printed."""
    asked, printed = client.execute(code), ""
    return _read(client, asked, printed, timeout)


def _read(client: Any, asked: str, printed: str, timeout: float) -> tuple[str, str]:
    error = ""
    while True:
        message = client.get_iopub_msg(timeout=timeout)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] == "stream":
            printed += content["text"]
        if message["msg_type"] == "error":
            error, printed = content["ename"], printed + "\n".join(content["traceback"])
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return error, printed


@pytest.mark.slow
def test_a_kernel_that_is_interrupted_keeps_the_study_and_itself(tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        assert answer(client, BEFORE) == ("", "")
        folder = str(tmp_path / "runs")
        asked = client.execute(SEARCH.format(space=ROOT / "search_spaces" / "quickstart.yaml", folder=folder))
        _await_evaluation(folder)
        manager.interrupt_kernel()
        error, told = _read(client, asked, "", 120)
        assert error == "Interrupted"  # a KeyboardInterrupt
        assert "resume=True" in told
        assert answer(client, AFTER) == ("", "False True set()\n")
        study = bilora_ray.load_study("quickstart", storage_path=folder)
        assert study.trials().status.tolist() == ["interrupted"]
        assert study.history().step.max() >= 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _await_evaluation(folder: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if len(bilora_ray.load_study("quickstart", storage_path=folder).history()):
                return
        except bilora_ray.UserError:  # it has not begun
            pass
        time.sleep(0.5)
    raise AssertionError("no evaluation within five minutes")
