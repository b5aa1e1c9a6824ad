"""A signal to the process or to its group: the search ends cleanly, says how to go on, and that command finishes it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_trials import Tiny

from bilora_ray.records import Status
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study

COMMAND = Path(sys.executable).with_name("bilora-ray")


def _wait_for_a_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob("runs/studies/*/trials/0000/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "number", "group"),
    [
        ("tune", signal.SIGINT, True),
        ("tune", signal.SIGTERM, False),
        ("tune", signal.SIGTERM, True),
        ("train", signal.SIGINT, False),
        ("train", signal.SIGHUP, True),
    ],
)
def test_a_signal_ends_it_cleanly_and_the_printed_command_goes_on(
    tiny: Tiny, tmp_path: Path, verb: str, number: signal.Signals, group: bool
) -> None:
    settings = tiny.config("causal-lm", max_steps=200, eval_steps=10).model_dump(exclude_unset=True)
    settings["rho"] = "{low: 0.01, high: 0.2}" if verb == "tune" else 0.05
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    (tmp_path / "space.yaml").write_text("study: {name: s, num_trials: 2, scheduler: none}\ntrial: {}\n")
    name = ["--name=s"] if verb == "train" else []
    process = subprocess.Popen(
        [COMMAND, verb, "--space=space.yaml", *name, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for_a_checkpoint(tmp_path, process)
    (os.killpg if group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (128 + number, "")
    *_, line = stderr.strip().splitlines()
    told, _, again = line.partition(": ")
    assert told == "Interrupted; what is done is kept. Go on"
    assert "Traceback" not in stderr
    assert {record.status for record in load_study(Layout(tmp_path / "runs"), "s").records()} == {Status.RUNNING}

    subprocess.run(shlex.split(again), cwd=tmp_path, check=True, capture_output=True)
    study = load_study(Layout(tmp_path / "runs"), "s")
    assert {record.status for record in study.records()} == {Status.COMPLETE}
    assert study.folder(0).state()["resumed_at"] != []
