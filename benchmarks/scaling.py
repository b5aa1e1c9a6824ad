"""What it costs to grow: a trial and a report with 1 to 16 trials at one time, and a study of 10 to 1,000 trials.

The trials are real to Ray Tune, the study database and MLflow, and train nothing: what is left is overhead. First whole
searches, in which each trial reports as fast as it is taken; then, without Ray, the driver's own work on a study
that grows, with early stops and without, in SQLite and, where --postgresql names a server, there too.

    python benchmarks/scaling.py [--concurrent 1 2 4 8 16] [--trials 10 100 1000] [--postgresql URL]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from ray import tune
from sqlalchemy import event

from bilora_ray.records import Status
from bilora_ray.runners import own_process
from bilora_ray.runners.task import NUMBER, telling, the_only
from bilora_ray.search.cluster.cluster import cluster
from bilora_ray.search.run import run_trials
from bilora_ray.search.session import Observers, study_info
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import delete_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri

REPORTS = 20
SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"


def null_trial(task: Mapping[str, Any]) -> None:
    """In the place of a training: its reports, as fast as they are taken."""
    trial = the_only(task)
    tell = telling(tune.report, trial)
    for step in range(1, REPORTS + 1):
        tell(evaluation(step, trial[NUMBER]))


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


def space(num_trials: int, scheduler: str) -> Space:
    """The quickstart's space, with `num_trials` trials."""
    study = {"num_trials": num_trials, "scheduler": scheduler}
    if scheduler != "none":
        study["grace_period"] = 2
    overrides = [*(f"study.{key}={value}" for key, value in study.items()), "resources.cpus_per_worker=0.01"]
    return load_space(SPACE, overrides)


def tracker(study: SearchStudy) -> MlflowTracker:
    """MLflow on a SQLite file beside the study."""
    folder = study.layout.storage_path
    return MlflowTracker.open(default_uri(folder), "scaling", folder / "artifacts", study_info(study, {}), print)


def measure_search(concurrent: int) -> str:
    """A row of a whole search without early stops. What a trial costs is counted from the first report on."""
    trials = max(8, 2 * concurrent)
    with (
        cluster(None),
        mock.patch.object(own_process, "RUNNER", replace(own_process.RUNNER, run=null_trial)),
        tempfile.TemporaryDirectory() as folder,
    ):
        study = open_study(space(trials, "none"), Layout(Path(folder)), {})
        observers = Observers([tracker(study)])
        with timed(study, "report") as in_study, timed(observers, "trial_reported") as in_mlflow:
            started = time.perf_counter()
            run_trials(study, observers, concurrent)
            ended = time.perf_counter()
    first = min(in_study)
    in_driver = " | ".join(f"{1000 * statistics.median(calls.values()):.1f}" for calls in (in_study, in_mlflow))
    rates = f"{(ended - first) / trials:.2f} | {len(in_study) / (max(in_study) - first):.0f}"
    return f"| {concurrent} | {trials} | {first - started:.1f} | {rates} | {in_driver} |"


@contextmanager
def timed(target: Any, name: str) -> Iterator[dict[float, float]]:
    """When each call of a method began in the block -> its seconds."""
    seconds: dict[float, float] = {}
    real: Callable[..., Any] = getattr(target, name)

    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return real(*arguments)
        finally:
            seconds[started] = time.perf_counter() - started

    with mock.patch.object(target, name, call):
        yield seconds


def measure_study(size: int, scheduler: str, database: str | None) -> str:
    """A row of the driver's own work on a study: what its last ten trials cost, and its memory at the end."""
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder), database)
        growing = space(size, scheduler)
        growing = replace(growing, study=growing.study.model_copy(update={"name": f"scaling-{size}-{scheduler}"}))
        study = open_study(growing, layout, {})
        with writes_of(study) as writes, timed(study, "next_trials") as asks, timed(study, "report") as reports:
            began, written = [], 0
            while numbers := study.next_trials():
                (number,) = numbers
                began.append(time.perf_counter())
                before = len(writes)
                for step in range(1, REPORTS + 1):
                    if study.report(number, evaluation(step, number)) is not Status.RUNNING:
                        break
                written += len(writes) - before
        memory = psutil.Process().memory_info().rss / 2**20
        delete_study(growing, layout)
    # The last call of next_trials finds nothing left.
    ask = statistics.median(list(asks.values())[-11:-1])
    report = statistics.median(seconds for at, seconds in reports.items() if at >= began[-min(10, size)])
    total = sum(asks.values()) + sum(reports.values())
    kind = "SQLite" if database is None else "PostgreSQL"
    figures = f"{len(reports)} | {1000 * ask:.0f} | {1000 * report:.1f} | {written / len(reports):.1f}"
    return f"| {kind} | {scheduler} | {size} | {figures} | {total:.0f} | {memory:.0f} |"


@contextmanager
def writes_of(study: SearchStudy) -> Iterator[list[str]]:
    """The statements of the block that change the study database."""
    writes: list[str] = []

    def note(*arguments: Any) -> None:
        statement = str(arguments[2])
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            writes.append(statement)

    engine = study.study._storage._backend.engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield writes
    finally:
        event.remove(engine, "before_cursor_execute", note)


def main() -> None:
    """Print the two tables, each row from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--trials", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--postgresql", metavar="URL", help="database for the second table, besides SQLite")
    arguments = parser.parse_args()
    databases = (None, arguments.postgresql) if arguments.postgresql else (None,)
    tables = (
        (
            "at one time | trials | until the first report (s) | a trial (s) | reports a second"
            " | a report: study (ms) | MLflow (ms)",
            [(measure_search, concurrent) for concurrent in arguments.concurrent],
        ),
        (
            "database | scheduler | trials | reports | ask for a trial (ms) | a report (ms) | writes a report"
            " | database time in all (s) | driver (MiB)",
            [
                (measure_study, size, scheduler, database)
                for database in databases
                for scheduler in ("none", "asha")
                for size in arguments.trials
            ],
        ),
    )
    for head, rows in tables:
        print(f"\n| {head} |\n|{' --- |' * len(head.split(' | '))}")
        for measure, *values in rows:
            with ProcessPoolExecutor(1, mp_context=get_context("fork")) as process:
                print(process.submit(measure, *values).result(), flush=True)


if __name__ == "__main__":
    main()
