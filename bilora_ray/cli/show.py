"""`bilora-ray show`: what a study found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.leaderboard import STATUS_WORDS, print_best, print_leaderboard, print_settings, study_as_json
from bilora_ray.cli.options import (
    absolute,
    json_option,
    optional_study_argument,
    print_json,
    print_next,
    storage_option,
    study_database_option,
)
from bilora_ray.cli.tables import in_short
from bilora_ray.config import CUDA_GIB
from bilora_ray.errors import UserError
from bilora_ray.records import LEAST_FOR_IMPORTANCES, Status

if TYPE_CHECKING:
    from rich.console import Console

    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.studies import StudySummary

EPILOG = """\b
Examples:
  bilora-ray show
  bilora-ray show quickstart
  bilora-ray show quickstart --json | jq .best.sampled
"""


@click.command(epilog=EPILOG)
@optional_study_argument
@storage_option
@study_database_option
@json_option
def command(study: str | None, storage_path: Path, study_database: str | None, as_json: bool) -> None:
    """Show a study's trials, its best settings and what mattered; without STUDY, list the studies."""
    from rich.console import Console

    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study, summarise

    layout = Layout(absolute(storage_path), study_database)
    console = Console(highlight=False)
    if study is None:
        if study_database is None and not layout.storage_path.is_dir():
            raise UserError(f"--storage-path {storage_path}: no such folder; `bilora-ray tune` and `train` make it")
        with naming_the_database(layout):
            summaries = summarise(layout)
        if as_json:
            print_json([asdict(summary) for summary in summaries])
        else:
            _print_studies(console, summaries, layout)
        return
    with naming_the_database(layout):
        found = load_study(layout, study)
        if as_json:
            print_json(study_as_json(found))
            return
        records, importances = found.records_now(), found.importances()
    counts = {words: sum(record.status is status for record in records) for status, words in STATUS_WORDS.items()}
    summary = ", ".join(f"{count} {words}" for words, count in counts.items() if count) or "no trials"
    console.print(f"Study '{study}': {summary} of {found.space.study.num_trials}", style="bold", markup=False)
    print_leaderboard(console, records, found.objective)
    if importances:
        console.print(
            f"What mattered, by the variance of {found.objective.metric} among complete trials:", markup=False
        )
        print_settings(console, {key: f"{share:.0%}" for key, share in importances.items()})
    elif found.space.distributions:
        console.print(f"What mattered: {_why_unknown(counts)}")
    peak = max((metrics.get("gpu_memory_gib", 0) for record in records for metrics in record.history), default=0)
    if peak:
        console.print(f"GPU memory of a worker: {peak + CUDA_GIB:.1f} GiB at the most, with CUDA's own")
    if any(record.status is Status.INTERRUPTED for record in records):
        verb = "tune" if found.space.distributions else "train"
        console.print(f"What is interrupted goes on with `bilora-ray {verb}`, as it was begun, and --resume.")
    console.print()
    best = print_best(console, found, records)
    if best is not None:
        print_next(study, storage_path, study_database, best.adapter)


def _why_unknown(counts: Mapping[str, int]) -> str:
    complete = counts[STATUS_WORDS[Status.COMPLETE]]
    if complete < LEAST_FOR_IMPORTANCES:
        return f"known from {LEAST_FOR_IMPORTANCES} complete trials on; there are {complete}"
    return "unknown: all complete trials have the same value"


def _print_studies(console: Console, summaries: Sequence[StudySummary], layout: Layout) -> None:
    from rich import box
    from rich.table import Column, Table

    if not summaries:
        console.print(f"no studies in {layout.database}", markup=False, soft_wrap=True)
        return
    name = Column("study", overflow="fold")
    table = Table(name, "trials ended", "metric", "best", box=box.SIMPLE_HEAD, pad_edge=False)
    for summary in summaries:
        ended = f"{summary.ended} of {summary.num_trials}"
        table.add_row(summary.study, ended, summary.metric, in_short(summary.best))
    console.print(table)
