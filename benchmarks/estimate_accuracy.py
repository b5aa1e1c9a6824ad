"""How near an estimate comes to the search that it is of: the quickstart, estimated and then run, in turns.

Of a search the processes of its trials are asked for their memory every other moment; it is told beside the estimate's
largest trial, and the longest complete trial beside the estimate's trials.

    python benchmarks/estimate_accuracy.py [--rounds 2] [--space search_spaces/quickstart.yaml]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve()
PROGRAM = Path(sys.executable).with_name("bilora-ray")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MLFLOW_TRACKING_URI": ""}
# What Ray calls the process of one of Tune's trials.
TRIAL = "ray::ImplicitFunc"
LOOK_S = 0.2


def run(*arguments: str) -> Any:
    """What a command prints as JSON."""
    done = subprocess.run([str(PROGRAM), *arguments], check=True, capture_output=True, env=ENVIRONMENT)
    return json.loads(done.stdout)


def search(space: Path) -> dict[str, float]:
    """Seconds of a search and of its trials that ran to their end, and bytes of the largest process of a trial."""
    largest, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            for process in psutil.process_iter(["name", "memory_info"]):
                if (process.info["name"] or "").startswith(TRIAL) and process.info["memory_info"]:
                    largest[0] = max(largest[0], process.info["memory_info"].rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with tempfile.TemporaryDirectory() as storage:
            started = time.perf_counter()
            found = run("tune", "--space", str(space), "--storage-path", storage, "--json")
            wall = time.perf_counter() - started
    finally:
        done.set()
        thread.join()
    complete = [one["evaluations"][-1]["train_runtime"] for one in found["trials"] if one["status"] == "complete"]
    trained = sum(one["evaluations"][-1]["train_runtime"] for one in found["trials"] if one["evaluations"])
    return {
        "wall": wall,
        "trial": statistics.median(complete),
        "hours": trained / 3600,
        "memory": float(largest[0]),
    }


def row(name: str, unit: str, estimated: Sequence[float], found: Sequence[float], scale: float = 1.0) -> str:
    """A line of the table: both medians, how far they are apart, and how far in the round that is off the most."""
    guess, truth = statistics.median(estimated), statistics.median(found)
    worst = max((one / other - 1 for one, other in zip(estimated, found, strict=True)), key=abs)
    off = f"{guess / truth - 1:+.0%} | {worst:+.0%}"
    return f"| {name} | {guess / scale:.3g} {unit} | {truth / scale:.3g} {unit} | {off} |"


def main() -> None:
    """Estimate and search in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--space", type=Path, default=HERE.parents[1] / "search_spaces" / "quickstart.yaml")
    arguments = parser.parse_args()
    guesses, found = [], []
    for _ in range(arguments.rounds):
        guesses.append(run("estimate", "--space", str(arguments.space), "--json"))
        found.append(search(arguments.space))
    print("| | estimated | found | off by | in the worst round |\n| --- | --- | --- | --- | --- |")
    of = {key: [one[key] for one in found] for key in found[0]}
    print(row("a trial to its end", "s", [one["trial_seconds"]["median"] for one in guesses], of["trial"]))
    print(row("the search", "s", [one["wall_seconds"]["median"] for one in guesses], of["wall"]))
    print(row("device-hours", "h", [one["device_hours"]["median"] for one in guesses], of["hours"]))
    print(row("memory of the largest trial", "GiB", [one["memory"][1] for one in guesses], of["memory"], 2**30))


if __name__ == "__main__":
    main()
