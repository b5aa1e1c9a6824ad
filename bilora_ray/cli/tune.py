"""`bilora-ray tune`: from a space file to the best adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bilora_ray.cli.finalists import print_finalists
from bilora_ray.cli.leaderboard import print_best, print_end, print_leaderboard, study_as_json
from bilora_ray.cli.options import (
    absolute,
    json_option,
    print_json,
    print_next,
    say_how_to_go_on,
    search_options,
    where_adapter_is,
)
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.tables import in_quotes
from bilora_ray.cli.validate import describe
from bilora_ray.config import FACTS
from bilora_ray.errors import UserError
from bilora_ray.paths import Locate, have_home, locate_here
from bilora_ray.search.cluster.protection import check_mlflow, check_ray
from bilora_ray.search.space import SEEDS, Space, setting_of
from bilora_ray.search.space_file import load_space
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
    if not insecure:
        check_ray(ray_address, "--ray-address")
        check_mlflow(mlflow_uri)
    if warm_start is not None:
        overrides = (*overrides, f"study.warm_start={json.dumps(warm_start.split(','))}")
    space = space_to_search(space_path, overrides, num_trials, max_concurrent)
    layout = Layout(absolute(storage_path), study_database)
    have_home()
    asked = num_trials is not None or any(override.startswith("study.num_trials=") for override in overrides)
    if extend is not None:
        if asked:
            raise UserError("--extend: says how many trials more; a number of all of them cannot be given beside it")
        resume = True
    if resume and not asked:
        space = _not_shrunk(space, layout, extend)
    if resume and not space.study.warm_start:
        space = _as_begun(space, layout)

    from bilora_ray.search.cluster.inputs import keep_inputs
    from bilora_ray.search.preflight import chat_notes, check_kernels, pinned, preflight

    space = pinned(space, layout if resume else None)
    checked = preflight(space, dry_run)
    # Ray is imported once the data is right.
    from bilora_ray.search.cluster.cluster import is_own

    if is_own(ray_address):
        check_kernels(space, apart=True)
    if dry_run:
        rehearsal = _rehearse(space, layout, resume, ray_address, checked.digests)
        if as_json:
            notes = checked.notes + rehearsal.notes
            print_json({**describe(space), **asdict(rehearsal), "labels": checked.labels, "notes": notes})
        else:
            _print_plan(space, rehearsal, checked)
        return
    checked = replace(checked, notes=(*checked.notes, *chat_notes(checked)))
    space, digests = keep_inputs(space, checked.digests, absolute(storage_path))
    started = time.monotonic()
    try:
        study = _search(space, layout, resume, mlflow_uri, ray_address, digests, checked)
    except KeyboardInterrupt:
        # Not by --extend, which would ask for as many once more.
        say_how_to_go_on(*([] if extend is None else [f"--num-trials={space.study.num_trials}"]))
    if as_json:
        print_json(study_as_json(study))
    else:
        spent = duration(time.monotonic() - started)
        spent = f", {spent} since the resume" if resume else f" in {spent}"
        _print_result(study, storage_path, study_database, mlflow_uri, spent)
    if study.best() is None:
        raise UserError(f"study '{space.study.name}': no trial is complete; `bilora-ray show` says how each ended")


def space_to_search(
    space_path: Path,
    overrides: tuple[str, ...],
    num_trials: int | None,
    max_concurrent: int | None,
    locate: Locate = locate_here,
) -> Space:
    """The checked space that the options name. UserError if it is wrong, or if it leaves nothing to search."""
    flags = [("num_trials", num_trials), ("max_concurrent", max_concurrent)]
    shortcuts = tuple(f"study.{key}={value}" for key, value in flags if value is not None)
    space = load_space(space_path, overrides + shortcuts, locate)
    if not space.distributions:
        raise UserError(f"{space_path}: no setting has a distribution, so there is nothing to search: bilora-ray train")
    return space


def _as_begun(space: Space, layout: Layout) -> Space:
    """`space` with the earlier studies that its study began with, which decide nothing any more."""
    from bilora_ray.search.study.studies import warm_start_before

    began = warm_start_before(layout, space.study.name)
    return replace(space, study=space.study.model_copy(update={"warm_start": began}))


def _not_shrunk(space: Space, layout: Layout, more: int | None) -> Space:
    """`space` with as many trials as the study was asked for before, if that is more than its file says.

    With `more`, it is so many more than the study was asked for, whatever its file says. UserError if none could begin.
    """
    from bilora_ray.search.study.studies import end_before, num_trials_before

    if more is not None and (end := end_before(space, layout)) is not None:
        key = end.partition(":")[0]
        raise UserError(f"--extend {more}: study '{space.study.name}' ended by {end}; give it another {key}")
    before = num_trials_before(layout, space.study.name)
    num_trials = max(space.study.num_trials, before) if more is None or not before else before + more
    return replace(space, study=space.study.model_copy(update={"num_trials": num_trials}))


def _rehearse(
    space: Space, layout: Layout, resume: bool, ray_address: str | None, digests: Mapping[str, str]
) -> Rehearsal:
    """Whatever can be tried of a search before it begins, but for a cluster that is elsewhere."""
    from bilora_ray.quiet import quiet
    from bilora_ray.search.cluster.cluster import capacity, check_address, is_own, this_machine
    from bilora_ray.search.study.control.finalists import check_finalists
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import check_study

    with naming_the_database(layout, then=""):
        check_study(space, layout, resume, digests)
        check_finalists(space, layout)
    check_address(ray_address)
    here = is_own(ray_address)
    if here:
        capacity(space.resources, [this_machine()])
    quiet()
    from bilora_ray.training.rehearsal import rehearse

    configs = [space.first_config()]
    for key in sorted(key for key in space.varied if FACTS[key].rehearsed):
        found = {getattr(config, key): config for config in map(space.trial_config, space.each_value(key))}
        configs += [config for value, config in found.items() if value != getattr(configs[0], key)]
    first, *_ = [rehearse(config, here) for config in configs]
    return first


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


def _search(
    space: Space,
    layout: Layout,
    resume: bool,
    mlflow_uri: str | None,
    ray_address: str | None,
    digests: Mapping[str, str],
    checked: Checked,
) -> SearchStudy:
    from bilora_ray.search.run import search, search_finalists

    objective = space.first_config().objective
    progress = SearchProgress(space.study.num_trials, objective, checked.notes, checked.labels)
    common: dict[str, Any] = {"ray_address": ray_address, "mlflow_uri": mlflow_uri, "digests": digests}
    study = search(space, layout, resume=resume, watcher=progress, **common)
    if space.study.finalists:
        note = f"these are the best {space.study.finalists} settings of '{space.study.name}', on fresh seeds"
        search_finalists(
            study, watcher_of=lambda finals: SearchProgress(finals.study.num_trials, objective, (note,)), **common
        )
    return study


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
