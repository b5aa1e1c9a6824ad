"""Searches that are told to end, or killed, in each of their phases: how long they take, and what they leave.

    python -m chaos.signals [--only TERM] [--resume]

Each of five signals goes to the process, and to its whole group as a terminal and `timeout` send it. A table says for
each how long the search took, its exit code, what it printed, which processes were left after ten seconds, and what the
study and MLflow say of the trials. With --resume each search is finished afterwards, and looked at once more.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from chaos.nodes import children
from chaos.searches import Search, kill_searches
from chaos.soundness import findings
from mlflow import MlflowClient
from tiny_trials import build

from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study

NUMBERS = ("INT", "TERM", "HUP", "QUIT", "KILL")
# What is caught, and so ends a search in order.
HEEDED = ("INT", "TERM", "HUP")
PHASES = ("importing", "starting", "running")
MOST_S, ORPHANS_S = 10.0, 10.0


@dataclass
class Stopped:
    """What came of a signal.

    Attributes:
        seconds: until the process had ended.
        code: its exit code.
        said: the lines that it printed from then on.
        orphans: the processes below it that were there ten seconds later.
        trials: how the study's trials stand.
        runs: MLflow's status of the runs.
    """

    seconds: float
    code: int
    said: list[str]
    orphans: list[str]
    trials: list[str]
    runs: list[str]

    def problems(self, name: str) -> list[str]:
        """All that is not as it should be after the signal `name`."""
        number = getattr(signal, f"SIG{name}")
        heeded = name in HEEDED
        expected = 128 + number if heeded else -number
        found = [
            f"exit code {self.code}" if self.code != expected else "",
            f"took {self.seconds:.1f} s" if self.seconds > MOST_S else "",
            f"left {', '.join(self.orphans)}" if self.orphans else "",
            f"said {len(self.said)} lines" if len(self.said) != heeded else "",
            f"trials are {', '.join(self.trials)}" if set(self.trials) - {"interrupted", "complete"} else "",
            f"runs are {', '.join(self.runs)}" if heeded and "RUNNING" in self.runs else "",
        ]
        return [problem for problem in found if problem]


def stop(search: Search, phase: str, name: str, group: bool) -> Stopped:
    """Start `search`, send it the signal `name` in a phase of it, and see what comes of it."""
    process = search.start()
    if phase == "starting":
        search.wait(process, lambda: any("raylet" in child.name() for child in children(process.pid)))
    elif phase == "running":
        search.wait(process, lambda: search.in_flight())
    else:
        time.sleep(1.0)
    below, before, started = children(process.pid), len(search.log.splitlines()), time.monotonic()
    (os.killpg if group else os.kill)(process.pid, getattr(signal, f"SIG{name}"))
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        code = 0
    seconds = time.monotonic() - started
    while (left := list(filter(_lives, below))) and time.monotonic() - started < seconds + ORPHANS_S:
        time.sleep(0.2)
    orphans = [child.name() for child in left if _lives(child)]
    # What goes on reporting in these moments is not what was said of the end.
    said = [line for line in search.log.splitlines()[before:] if line and not line.startswith("trial ")]
    return Stopped(seconds, code, said, orphans, _trials(search), _runs(search))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _trials(search: Search) -> list[str]:
    if not search.trials():
        return []
    return [record.status.value for record in load_study(Layout(search.runs), search.name).records_now()]


def _runs(search: Search) -> list[str]:
    try:
        client = MlflowClient(f"sqlite:///{search.runs / 'mlflow.db'}")
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        return [run.info.status for run in client.search_runs(ids)] if (search.runs / "mlflow.db").exists() else []
    except Exception:  # it was being made
        return []


def main() -> None:
    """Read the options, stop the searches, and print the table."""
    parser = argparse.ArgumentParser(description="Stop and kill searches, and see what they leave.")
    parser.add_argument("--only", choices=NUMBERS, help="one of the signals")
    parser.add_argument("--phase", choices=PHASES, help="one of the phases")
    parser.add_argument("--resume", action="store_true", help="finish each search, and look at it once more")
    options = parser.parse_args()
    folder, bad = Path(tempfile.mkdtemp(prefix="signals-")), 0
    (folder / "tiny").mkdir()
    tiny = build(folder / "tiny")
    print(f"{'phase':<10} {'signal':<7} {'to':<8} {'seconds':>7} {'code':>5}  found", flush=True)
    for phase in [options.phase] if options.phase else PHASES:
        for name in [options.only] if options.only else NUMBERS:
            for group in (False, True):
                search = Search(folder / f"{phase}-{name}-{group}", tiny, max_steps=400, eval_steps=10)
                found = stop(search, phase, name, group)
                problems = found.problems(name)
                if options.resume:
                    again = search.start(*(["--resume"] if search.trials() else []))
                    problems += [] if search.ends(again) == 0 else ["does not resume"]
                    problems += [what for _, what in findings(search)]
                bad += bool(problems)
                to = "group" if group else "process"
                line = f"{phase:<10} {name:<7} {to:<8} {found.seconds:>7.1f} {found.code:>5}"
                print(f"{line}  {'; '.join(problems) or 'as it should be'}", flush=True)
    kill_searches()
    print(f"Everything is in {folder}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
