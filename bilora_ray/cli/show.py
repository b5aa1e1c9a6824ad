"""`bilora-ray show`: what a study found."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.finalists import print_finalists
from bilora_ray.cli.leaderboard import (
    print_best,
    print_end,
    print_leaderboard,
    print_settings,
    study_as_json,
)
from bilora_ray.cli.options import (
    absolute,
    json_option,
    optional_study_argument,
    print_json,
    print_next,
    storage_option,
    study_database_option,
    where_adapter_is,
)
from bilora_ray.errors import UserError
from bilora_ray.measures import CUDA_GIB
from bilora_ray.records import Status, TrialRecord
from bilora_ray.training.compute.cutting import Proven
from bilora_ray.words import counted, in_short

if TYPE_CHECKING:
    from rich.console import Console

    from bilora_ray.search.study.importances import Importances
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.studies import StudySummary
    from bilora_ray.search.study.view import StudyView

EPILOG = """\b
Examples:
  bilora-ray show
  bilora-ray show quickstart
  bilora-ray show quickstart --json | jq .best.sampled
  bilora-ray show quickstart --csv | column -s, -t
  bilora-ray show quickstart --trial 5
"""


@click.command(epilog=EPILOG)
@optional_study_argument
@storage_option
@study_database_option
@click.option("--trial", "number", type=int, metavar="N", help="Show this trial alone: settings, evaluations, files.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the trials as CSV, the best first, names and numbers whole.")
@json_option
def command(
    study: str | None,
    storage_path: Path,
    study_database: str | None,
    number: int | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Show a study's trials, its best settings and what mattered; without STUDY, list the studies."""
    _check_options(study, number, as_csv, as_json)
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database

    layout = Layout(absolute(storage_path), study_database)
    if study is None and study_database is None and not layout.storage_path.is_dir():
        raise UserError(f"--storage-path {storage_path}: no such folder; `bilora-ray tune` and `train` make it")
    with naming_the_database(layout, then=""):
        if study is None:
            _show_studies(layout, as_json)
        elif number is not None:
            _show_trial(study, number, layout, as_json)
        elif as_csv:
            _print_csv(study, layout)
        else:
            _show_study(study, layout, storage_path, as_json)


def _check_options(study: str | None, number: int | None, as_csv: bool, as_json: bool) -> None:
    if study is None and number is not None:
        raise UserError("--trial: needs the study that it is of; bilora-ray show STUDY --trial N")
    if as_csv and (study is None or number is not None or as_json):
        raise UserError("--csv: prints the trials of one study: bilora-ray show STUDY --csv; leave the others out")


def _show_trial(study: str, number: int, layout: Layout, as_json: bool) -> None:
    from rich.console import Console

    from bilora_ray.cli.trial import one_trial, print_trial, trial_as_json
    from bilora_ray.search.study.studies import load_study

    found = load_study(layout, study)
    record = one_trial(found, number)
    if as_json:
        print_json(trial_as_json(found, record))
    else:
        print_trial(Console(highlight=False), found, record)


def _print_csv(study: str, layout: Layout) -> None:
    from bilora_ray.library.rows import trial_rows
    from bilora_ray.search.study.studies import load_study

    rows = trial_rows(load_study(layout, study))
    writer = csv.DictWriter(sys.stdout, rows[0] if rows else ["trial", "status"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _show_studies(layout: Layout, as_json: bool) -> None:
    from rich.console import Console

    from bilora_ray.search.study.studies import summarise

    summaries = summarise(layout)
    if as_json:
        print_json([asdict(summary) for summary in summaries])
    else:
        _print_studies(Console(highlight=False), summaries, layout)


def _show_study(study: str, layout: Layout, storage_path: Path, as_json: bool) -> None:
    from rich.console import Console

    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.studies import load_study
    from bilora_ray.search.study.view import compared_in, comparison_of, search_of

    console = Console(highlight=False)
    found = load_study(layout, study)
    if as_json:
        print_json(study_as_json(found))
        return
    records, importances = [*found.records_now(), *found.queued()], found.importances()
    console.print(f"Study '{study}': {counted(records)} of {found.space.study.num_trials}", style="bold", markup=False)
    print_end(console, found)
    if found.warm_start:
        from bilora_ray.search.study.warm_start import in_words

        console.print(f"It began with a {in_words(found.warm_start)}.", markup=False, soft_wrap=True)
    print_leaderboard(console, records, found.objectives, found.front(records))
    if found.space.distributions and compared_in(found.study) is None:
        _print_importances(console, found, importances)
    peak = max((metrics.get("gpu_memory_gib", 0) for record in records for metrics in record.history), default=0)
    if peak:
        console.print(f"GPU memory of a worker: {peak + CUDA_GIB:.1f} GiB at the most, with CUDA's own")
    _print_limits(console, records)
    _print_disk(console, found, records)
    if any(record.status is Status.INTERRUPTED for record in records):
        verb = "tune" if found.space.distributions else "train"
        verb = "compare" if comparison_of(found.study) is not None else verb
        console.print(f"What is interrupted goes on with `bilora-ray {verb}`, as it was begun, and --resume.")
    console.print()
    if (search := search_of(found.study)) is not None:
        line = f"These are the finalists of study '{search}', on fresh seeds; `bilora-ray show {search}` judges them"
        console.print(line, markup=False, soft_wrap=True)
        return
    if (comparison := comparison_of(found.study)) is not None:
        runs = "These are the runs" if compared_in(found.study) is not None else "It is a part"
        line = f"{runs} of comparison '{comparison}', which `bilora-ray compare` and --resume tell of"
        console.print(line, markup=False, soft_wrap=True)
        _print_outcome(console, layout.study(study))
    best = None if found.best() is None else print_best(console, found, records)
    if (finals := finals_of(found)) is not None:
        best = print_finalists(console, found, finals) or best
    if best is not None:
        print_next(study, storage_path, layout.study_database, where_adapter_is(found, best))


def _print_outcome(console: Console, folder: Path) -> None:
    """What a comparison came to, where its scored runs are this study's."""
    from bilora_ray.evidence.kept import kept_in

    if (kept := kept_in(folder)) is not None:
        for line in (*kept.sentences, *(f"Note: {note}" for note in kept.notes)):
            console.print(line, markup=False, soft_wrap=True)


def _print_limits(console: Console, records: Sequence[TrialRecord]) -> None:
    """Say what ran out of memory and went on smaller, if something did."""
    told = {record.number: Proven.told_by(record.history[-1]) for record in records if record.history}
    limited = [number for number, proven in told.items() if proven != Proven()]
    which = f"trial {limited[0]}" if len(limited) == 1 else f"{len(limited)} trials"
    for line in Proven.least(told.values()).in_words():
        console.print(f"In {which}: {line}.", markup=False, soft_wrap=True)


def _print_disk(console: Console, study: StudyView, records: Sequence[TrialRecord]) -> None:
    """Say what the study takes of the disk, and whose adapters are there."""
    from bilora_ray.search.study.control.disk import GB, used_by

    kept = sum(record.adapter is not None and record.adapter.is_dir() for record in records)
    removed = sum(bool(record.removed) for record in records)
    adapters = f"{kept} adapter{'' if kept == 1 else 's'}" + (f", {removed} more were removed" if removed else "")
    console.print(f"Disk: {used_by(study) / GB:.3g} GB, {adapters}", markup=False)


def _print_importances(console: Console, study: StudyView, found: Importances) -> None:
    from bilora_ray.search.study.importances import METHOD

    at = "" if found.rows is None else f", by {study.objective.metric} after {found.rows} training rows"
    if found.unknown:
        console.print(f"What mattered{at}: {found.unknown}", markup=False)
        return
    console.print(f"What mattered{at}, of its variance among {found.num_trials} trials:", markup=False)
    shares = {key: f"{share.share:.0%} ({share.low:.0%} to {share.high:.0%})" for key, share in found.shares.items()}
    others = [key for key in study.space.distributions if key not in shares]
    print_settings(console, shares | dict.fromkeys(others, "cannot be told"))
    console.print(f"By {METHOD}.", style="dim", markup=False)


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
        name_told = f"{summary.study} (its folder is gone)" if summary.is_gone else summary.study
        table.add_row(name_told, ended, summary.metric, in_short(summary.best))
    console.print(table)
