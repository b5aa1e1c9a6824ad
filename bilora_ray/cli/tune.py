"""`bilora-ray tune`: from a space file to the best adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.finalists import print_finalists
from bilora_ray.cli.leaderboard import print_best, print_end, print_leaderboard, study_as_json
from bilora_ray.cli.options import (
    absolute,
    json_option,
    leaving_to_go_on,
    print_json,
    print_next,
    search_options,
    where_adapter_is,
)
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.tables import in_quotes
from bilora_ray.cli.validate import describe
from bilora_ray.cli.waiting import waiting
from bilora_ray.errors import UserError
from bilora_ray.library.asked import Asked
from bilora_ray.library.searching import Search, check_search, is_counted, rehearse, run_search, space_of
from bilora_ray.search.space import SEEDS, Space, setting_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.words import duration

if TYPE_CHECKING:
    from bilora_ray.search.preflight import Checked
    from bilora_ray.search.study.study import SearchStudy
    from bilora_ray.training.rehearsal import Rehearsal

EPILOG = """\b
Examples:
  bilora-ray tune --space quickstart
  bilora-ray tune --space quickstart --resume
  bilora-ray tune --space quickstart --extend 10
  bilora-ray tune --space llama --num-trials 40 --ray-address auto --storage-path /shared/runs
  bilora-ray tune --space llama --set rho=0.05 --set 'rank={choice: [8, 16]}' --dry-run
"""


@click.command(epilog=EPILOG)
@search_options
@click.option("--ray-address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray cluster.  [default: this machine]")
@json_option
def command(
    space_path: Path,
    overrides: tuple[str, ...],
    num_trials: int | None,
    max_concurrent: int | None,
    resume: bool,
    extend: int | None,
    storage_path: Path,
    study_database: str | None,
    mlflow_uri: str | None,
    insecure: bool,
    warm_start: str | None,
    dry_run: bool,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Search a space file for the best adapter.

    Ray Tune runs the trials, Optuna proposes them, weak ones are stopped early, MLflow records all of them. The search
    may be interrupted at any moment, by Ctrl-C or worse: --resume finishes it, each trial exactly once.
    """
    layout = Layout(absolute(storage_path), study_database)
    earlier = () if warm_start is None else tuple(warm_start.split(","))
    asked = Asked(
        layout=layout,
        resume=resume,
        extend=extend,
        ray_address=ray_address,
        mlflow_uri=mlflow_uri,
        insecure=insecure,
        dry_run=dry_run,
        num_trials=num_trials,
        max_concurrent=max_concurrent,
        warm_start=earlier,
    )
    space = space_of(space_path, overrides, asked)
    with waiting("reading and checking the data and the model"):
        search = check_search(space, asked, is_counted(overrides, asked))
    if dry_run:
        with waiting("trying what can be tried without weights"):
            rehearsal = rehearse(search)
        _tell_plan(search, rehearsal, as_json)
        return
    with waiting("loading what a search needs"):
        import bilora_ray.search.run  # noqa: F401 - what it takes is seconds
    started = time.monotonic()
    # Not by --extend, which would ask for as many once more.
    with leaving_to_go_on(*([] if extend is None else [f"--num-trials={search.space.study.num_trials}"])):
        study = run_search(search, partial(SearchProgress, starting="starting Ray, opening MLflow"))
    if as_json:
        print_json(study_as_json(study))
    else:
        spent = duration(time.monotonic() - started)
        spent = f", {spent} since the resume" if search.asked.resume else f" in {spent}"
        _print_result(study, storage_path, study_database, mlflow_uri, spent)
    if study.best() is None:
        name = search.space.study.name
        raise UserError(f"study '{name}': no trial is complete; `bilora-ray show` says how each ended")


def _tell_plan(search: Search, rehearsal: Rehearsal, as_json: bool) -> None:
    checked = search.checked
    if as_json:
        notes = checked.notes + rehearsal.notes
        print_json({**describe(search.space), **asdict(rehearsal), "labels": checked.labels, "notes": notes})
    else:
        _print_plan(search.space, rehearsal, checked)


def _print_plan(space: Space, rehearsal: Rehearsal, checked: Checked) -> None:
    study, resources = space.study, space.resources
    click.echo(f"Study '{study.name}' would run {study.num_trials} trials ({study.sampler}, {study.scheduler}) over")
    for name, part in space.parts.items():
        click.echo(f"  {setting_of(name):<28} {part}")
    if study.finalists:
        click.echo(f"and then the best {study.finalists} on {study.finalist_seeds or SEEDS} fresh seeds each,")
    workers = f"{resources.workers} workers, each with " if resources.workers > 1 else ""
    room = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    click.echo(f"each on {workers}{room}.")
    if study.warm_start:
        click.echo(f"It would begin with what was best in {', '.join(study.warm_start)}.")
    for split, rows in rehearsal.rows.items():
        click.echo(f"{split} rows: {rows.rows}; {rows.in_words(space.first_config().model_dump())}")
    click.echo(f"of a training row the model reads {in_quotes(rehearsal.input)}")
    click.echo(f"and learns {in_quotes(rehearsal.target)}")
    for line in checked.labels:
        click.echo(line)
    for line in checked.notes + rehearsal.notes:
        click.secho(f"Note: {line}", fg="yellow")
    click.echo("Nothing was started.")


def _print_result(
    study: SearchStudy, storage_path: Path, study_database: str | None, mlflow_uri: str | None, spent: str
) -> None:
    from rich.console import Console

    from bilora_ray.search.study.control.finalists import finals_of

    console = Console(highlight=False)
    records, name = study.records(), study.space.study.name
    console.print(f"\nStudy '{name}': {len(records)} trials{spent}", style="bold", markup=False)
    print_end(console, study)
    print_leaderboard(console, records, study.objectives, study.front(records), most=10)
    best = print_best(console, study, records)
    if (finals := finals_of(study)) is not None:
        best = print_finalists(console, study, finals) or best
    if best is not None:
        print_next(name, storage_path, study_database, where_adapter_is(study, best), mlflow_uri)
