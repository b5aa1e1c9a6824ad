"""What a trial costs the process that drives a search, at the beginning of a study of 1,000 trials and at its end.

The real study decides, over trials that take no time: nine evaluations each, four at a time, in a SQLite file. Told are
the processor's milliseconds a trial, the statements that the database was asked and the rows it answered with, a trial,
all as medians of the first 100 trials (the first 20 apart) and of the last 100, and the memory after 100 trials and at
the end. Each sampler runs without early stops and each scheduler with TPE, in processes of their own.

Left out is what the processor only waits for, above all the disk at each commit, and what a real search has beside its
study: the trials' folders, MLflow and Ray.

    python benchmarks/driver_overhead.py [--num-trials 1000] [--storage FOLDER] [--only WORD ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from sqlalchemy import Engine, event

from bilora_ray.config import TrialConfig
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import SAMPLERS
from bilora_ray.search.study.schedulers import SCHEDULERS
from bilora_ray.search.study.studies import open_study

TRIAL = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "per_device_train_batch_size=8")
RANGES = (
    "rho={low: 0.005, high: 1.0, log: true}",
    "learning_rate={low: 1e-5, high: 1e-1, log: true}",
    "rank={low: 2, high: 64, log: true}",
    "auxiliary_rank={low: 2, high: 64, log: true}",
    "lora_dropout={low: 0.0, high: 0.5}",
)
COUNTED = (
    "rho={choice: [0.005, 0.01, 0.05, 0.1, 0.5, 1.0]}",
    "learning_rate={choice: [1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1]}",
    "rank={choice: [2, 4, 8, 16, 32, 64]}",
    "auxiliary_rank={choice: [2, 4, 8, 16, 32]}",
)
STEPS = 9
ENDS = ("first", "last")
HEAD = (
    "| sampler | scheduler | ms a trial, first | last | statements, first | last | rows, first | last "
    "| MB at 100 | at the end |"
)


def curve(config: TrialConfig) -> list[Metrics]:
    """Falls to a bowl's height at the settings, in a time that differs from trial to trial."""
    away = (math.log10(config.rho) + 1) ** 2 + (math.log10(config.learning_rate) + 3) ** 2
    loss = 0.1 * away + 0.01 * (math.log2(config.rank) - 3) ** 2
    second = 1 + config.rho
    return [
        {"step": step, "max_steps": STEPS, "eval_loss": loss + 1 / step, "train_runtime": step * second}
        for step in range(1, STEPS + 1)
    ]


def measure(sampler: str, scheduler: str, num_trials: int, storage: Path) -> dict[str, float]:
    """The figures of one study, in this process."""
    told = {"name": "overhead", "sampler": sampler, "scheduler": scheduler, "num_trials": num_trials}
    of_study = [f"study.{key}={value}" for key, value in told.items()]
    ranges = COUNTED if sampler == "grid" else RANGES
    space = load_space(None, [*TRIAL, *ranges, *of_study])
    statements = rows = 0
    # Of each trial that begins: the processor's seconds, the statements and the rows so far, and the bytes in use.
    seen: list[tuple[float, int, int, int]] = []

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    def fetched(_: sqlite3.Cursor, row: tuple[object, ...]) -> tuple[object, ...]:
        nonlocal rows
        rows += 1
        return row

    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.row_factory = fetched

    def begins(config: TrialConfig) -> list[Metrics]:
        seen.append((time.process_time(), statements, rows, psutil.Process().memory_info().rss))
        return curve(config)

    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "connect", connected)
    study = open_study(space, Layout(storage), {})
    try:
        simulate(study, begins, workers=4)
    finally:
        study.release()
    costs = [(1000 * (b[0] - a[0]), b[1] - a[1], b[2] - a[2]) for a, b in itertools.pairwise(seen)]
    part = max(1, num_trials // 10)
    first, last = costs[part // 5 : part], costs[-part:]
    return {
        "first_ms": statistics.median(cost[0] for cost in first),
        "last_ms": statistics.median(cost[0] for cost in last),
        "mean_ms": statistics.fmean(cost[0] for cost in costs),
        "first_statements": statistics.median(cost[1] for cost in first),
        "last_statements": statistics.median(cost[1] for cost in last),
        "first_rows": statistics.median(cost[2] for cost in first),
        "last_rows": statistics.median(cost[2] for cost in last),
        "first_mb": seen[part][-1] / 1e6,
        "last_mb": seen[-1][-1] / 1e6,
    }


def main() -> None:
    """Print a table, one line a sampler and one a scheduler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--storage", type=Path, help="where studies are kept; a temporary folder if absent")
    parser.add_argument("--only", nargs="*", help="samplers and schedulers to measure; all if absent")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.num_trials, arguments.storage)))
        return
    pairs = [(sampler, "none") for sampler in SAMPLERS] + [("tpe", name) for name in SCHEDULERS if name != "none"]
    print(HEAD, "| --- " * 10 + "|", sep="\n")
    for pair in pairs:
        if arguments.only and not set(arguments.only) & set(pair):
            continue
        with tempfile.TemporaryDirectory(dir=arguments.storage) as storage:
            command = [sys.executable, __file__, "--one", *pair, "--num-trials", str(arguments.num_trials)]
            done = subprocess.run(
                [*command, "--storage", storage],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        found = json.loads(done.stdout)
        times = f"{found['first_ms']:.1f} | {found['last_ms']:.1f}"
        reads = " | ".join(f"{found[f'{when}_{what}']:.0f}" for what in ("statements", "rows") for when in ENDS)
        memory = " | ".join(f"{found[f'{when}_mb']:.0f}" for when in ENDS)
        print(f"| {' | '.join(pair)} | {times} | {reads} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
