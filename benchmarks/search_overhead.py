"""What a search costs beyond the training in it.

Runs the quickstart space with 8 one-worker trials of two epochs, one at a time and without early stops, in a new
storage path, and prints the wall time of the whole command beside the trials' summed training time (steps, evaluations
and checkpoints; neither imports nor the loading of the model).

    python benchmarks/search_overhead.py [--repeats 3] [--num-trials 8]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"


def measure(num_trials: int) -> tuple[float, float]:
    """Seconds of the whole search, and seconds of training in it."""
    with tempfile.TemporaryDirectory() as storage:
        program, place = str(Path(sys.executable).with_name("bilora-ray")), ["--storage-path", storage]
        command = [program, "tune", "--space", str(SPACE), *place, "--num-trials", str(num_trials)]
        command += ["--max-concurrent", "1", "--set", "study.scheduler=none", "--set", "num_train_epochs=2"]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "MLFLOW_TRACKING_URI": ""})
        wall = time.perf_counter() - started
        shown = subprocess.run([program, "show", "quickstart", *place, "--json"], check=True, capture_output=True)
    trials = json.loads(shown.stdout)["trials"]
    assert len(trials) == num_trials
    return wall, sum(trial["evaluations"][-1]["train_runtime"] for trial in trials)


def main() -> None:
    """Print a table, one line a repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-trials", type=int, default=8)
    arguments = parser.parse_args()
    print("| repeat | wall (s) | training (s) | overhead (s) |\n| --- | --- | --- | --- |")
    overheads = []
    for repeat in range(arguments.repeats):
        wall, training = measure(arguments.num_trials)
        overheads.append(wall - training)
        print(f"| {repeat + 1} | {wall:.1f} | {training:.1f} | {wall - training:.1f} |", flush=True)
    spread = f"{min(overheads):.1f} to {max(overheads):.1f}"
    print(f"\nOverhead of {arguments.num_trials} trials: median {statistics.median(overheads):.1f} s, range {spread} s")


if __name__ == "__main__":
    main()
