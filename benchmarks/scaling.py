"""What it costs to grow: a trial and a report with 1 to 16 trials at one time, and a study of 10 to 1,000 trials.

The trials are real to Ray Tune, the study database and MLflow, and train nothing: what is left is overhead. First whole
searches, in which each trial reports as fast as it is taken; then, without Ray, the driver's own work on a study
that grows, in SQLite and, where --postgresql names a server, there too.

    python benchmarks/scaling.py [--concurrent 1 2 4 8 16] [--trials 10 100 1000] [--postgresql URL]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from ray import tune

from bilora_ray.scale.trial import EVALUATION
from bilora_ray.search.cluster import cluster
from bilora_ray.search.layout import Layout
from bilora_ray.search.run import run_trials
from bilora_ray.search.session import Observers
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.studies import delete_study, open_study
from bilora_ray.search.study import SearchStudy
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri

REPORTS = 20
SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"


def null_trial(task: Mapping[str, Any]) -> None:
    """In the place of a training: its reports, as fast as they are taken."""
    for step in range(1, REPORTS + 1):
        tune.report({EVALUATION: evaluation(step, task["number"])})


def evaluation(step: int, number: int) -> dict[str, float]:
    """As many metrics as a real evaluation has."""
    names = (
        "epoch",
        "learning_rate",
        "train_loss",
        "tokens_per_second",
        "auxiliary_norm",
        "eval_loss",
        "train_runtime",
    )
    value = (number * 0.618) % 1 + step / REPORTS
    return {"step": step, "max_steps": REPORTS, "eval_exact_match": value, **dict.fromkeys(names, value)}


def space(num_trials: int) -> Space:
    """The quickstart's space, with `num_trials` trials and no early stops."""
    overrides = [f"study.num_trials={num_trials}", "study.scheduler=none", "resources.cpus_per_worker=0.01"]
    return load_space(SPACE, overrides)


def tracker(study: SearchStudy) -> MlflowTracker:
    """MLflow on a SQLite file beside the study."""
    folder = study.layout.storage_path
    return MlflowTracker.open(
        default_uri(folder), "scaling", study.study.study_name, folder / "artifacts", {}, {}, {}, print
    )


def measure_searches(counts: list[int]) -> None:
    """Print seconds a trial and a report of whole searches, for each number of trials at one time."""
    print("| at one time | trials | wall (s) | a trial (s) | reports a second | a report in the driver (ms) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for concurrent in counts:
        trials = max(8, 2 * concurrent)
        with tempfile.TemporaryDirectory() as folder:
            study = open_study(space(trials), Layout(Path(folder)), {})
            observers = Observers([tracker(study)])
            with timed(study, "report") as in_study, timed(observers, "trial_reported") as in_mlflow:
                started = time.perf_counter()
                run_trials(study, observers, concurrent)
                wall = time.perf_counter() - started
        driver = 1000 * (sum(in_study) + sum(in_mlflow)) / len(in_study)
        rate = trials * REPORTS / wall
        print(f"| {concurrent} | {trials} | {wall:.1f} | {wall / trials:.2f} | {rate:.0f} | {driver:.0f} |", flush=True)


@contextmanager
def timed(target: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a method, for the block."""
    seconds: list[float] = []
    real: Callable[..., Any] = getattr(target, name)

    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return real(*arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    with mock.patch.object(target, name, call):
        yield seconds


def measure_studies(sizes: list[int], database: str | None) -> None:
    """Print what the driver's work on the last ten trials of a study costs, and its memory, as the study grows."""
    kind = "SQLite" if database is None else "PostgreSQL"
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            layout = Layout(Path(folder), database)
            growing = replace(space(size), study=space(size).study.model_copy(update={"name": f"scaling-{size}"}))
            study = open_study(growing, layout, {})
            asks, reports = [], []
            while True:
                started = time.perf_counter()
                number = study.next_trial()
                if number is None:
                    break
                asks.append(time.perf_counter() - started)
                for step in range(1, REPORTS + 1):
                    started = time.perf_counter()
                    study.report(number, evaluation(step, number))
                    reports.append(time.perf_counter() - started)
            memory = psutil.Process().memory_info().rss / 2**20
            ask = statistics.median(asks[-10:]) * 1000
            report = statistics.median(reports[-10 * REPORTS :]) * 1000
            print(
                f"| {kind} | {size} | {ask:.0f} | {report:.1f} | {sum(asks) + sum(reports):.0f} | {memory:.0f} |",
                flush=True,
            )
            delete_study(growing, layout)


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--trials", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--postgresql", metavar="URL", help="database for the second table, besides SQLite")
    arguments = parser.parse_args()
    if arguments.concurrent:
        with cluster(None), mock.patch("bilora_ray.search.run.run_trial", null_trial):
            measure_searches(arguments.concurrent)
    print("\n| database | trials | ask for a trial (ms) | a report (ms) | database time in all (s) | driver (MiB) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for database in (None, arguments.postgresql) if arguments.postgresql else (None,):
        measure_studies(arguments.trials, database)


if __name__ == "__main__":
    main()
