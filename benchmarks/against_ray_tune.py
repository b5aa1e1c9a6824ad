"""The quickstart's 12 LoRA trials here, and as a good user would write them without us: `rival_ray_tune.py`.

All run as whole commands, one after the other, twice: the same settings for each of the 12 trials (those that our
study draws, which the rival enqueues), the same data, model, batch, schedule, evaluations and rungs, two trials at a
time with one thread each. Each stops trials in its own way, so that the steps that it trained are in the table;
`--no-stops` runs every trial to its end. What favours the rival: it tracks nothing, where ours fills MLflow, and it
could not go on after a crash. What favours us: by Tune's default the rival has a new process for each trial, which
imports torch and transformers anew, where ours keep theirs; so it runs a second time with Tune's `reuse_actors`.

    python benchmarks/against_ray_tune.py [--rounds 2] [--no-stops] [--num-trials 12]
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SPACE, RIVAL = REPOSITORY / "search_spaces" / "quickstart.yaml", Path(__file__).with_name("rival_ray_tune.py")
# The rival's name -> what makes it that one.
RIVALS = {"Ray Tune, Trainer, PEFT": [], "the same, reuse_actors": ["--reuse-actors"]}
ENVIRONMENT = {**os.environ, "MLFLOW_TRACKING_URI": ""}


@dataclass(frozen=True)
class Outcome:
    """What one whole command did.

    Attributes:
        wall: its seconds.
        steps: optimizer steps of all its trials.
        exact_match: of each trial the best.
        points: the settings of each trial.
    """

    wall: float
    steps: int
    exact_match: list[float]
    points: list[dict[str, Any]]


def timed(command: list[str]) -> float:
    """Wall seconds of `command`."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - started


def ours(num_trials: int, no_stops: bool) -> Outcome:
    """Our search."""
    with tempfile.TemporaryDirectory() as storage:
        program, place = str(Path(sys.executable).with_name("bilora-ray")), ["--storage-path", storage]
        command = [program, "tune", "--space", str(SPACE), *place, "--num-trials", str(num_trials)]
        command += ["--max-concurrent", "2", "--set", "method=lora"]
        wall = timed(command + (["--set", "study.scheduler=none"] if no_stops else []))
        shown = subprocess.run([program, "show", "quickstart", *place, "--json"], check=True, capture_output=True)
    trials = json.loads(shown.stdout)["trials"]
    steps = sum(int(trial["evaluations"][-1]["step"]) for trial in trials)
    best = [max(evaluation["eval_exact_match"] for evaluation in trial["evaluations"]) for trial in trials]
    points = [trial["sampled"] for trial in trials]
    return Outcome(wall, steps, best, points)


def rivals(points: list[dict[str, Any]], options: list[str]) -> Outcome:
    """The rival's search of the same settings."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "points.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(points))
        wall = timed([sys.executable, str(RIVAL), str(asked), str(told), *options])
        trials = json.loads(told.read_text())
    found = [{key: trial[key] for key in ("rank", "learning_rate")} for trial in trials]
    assert sorted(map(repr, found)) == sorted(map(repr, points)), "the rival tried other settings"
    return Outcome(wall, sum(t["steps"] for t in trials), [t["exact_match"] for t in trials], found)


def main() -> None:
    """Print a table, a line for each search of a round, and the ratios to each rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-trials", type=int, default=12)
    parser.add_argument("--no-stops", action="store_true", help="every trial runs to its end")
    arguments = parser.parse_args()
    options = ["--no-stops"] if arguments.no_stops else []
    print("| round | search | wall (s) | steps | best exact match | median exact match of a trial |")
    print("| --- | --- | --- | --- | --- | --- |")
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in RIVALS}
    for number in range(1, arguments.rounds + 1):
        our = ours(arguments.num_trials, arguments.no_stops)
        found = {name: rivals(our.points, [*options, *more]) for name, more in RIVALS.items()}
        for name, rival in found.items():
            ratio = our.wall / rival.wall
            ratios[name].append((ratio, ratio * rival.steps / our.steps))
        for name, one in (("bilora-ray", our), *found.items()):
            figures = f"{one.wall:.1f} | {one.steps} | {max(one.exact_match):.3f}"
            print(f"| {number} | {name} | {figures} | {statistics.median(one.exact_match):.3f} |", flush=True)
    print()
    for name, pairs in ratios.items():
        for what, values in zip(("wall time", "wall time per step"), zip(*pairs, strict=True), strict=True):
            each = ", ".join(f"{ratio:.2f}" for ratio in values)
            print(f"Our {what} over that of {name}: median {statistics.median(values):.2f} (of {each})")


if __name__ == "__main__":
    main()
