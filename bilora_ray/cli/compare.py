"""`bilora-ray compare`: whether one method beats another, each tuned alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from bilora_ray.cli.options import (
    absolute,
    insecure_option,
    json_option,
    leaving_to_go_on,
    mlflow_option,
    print_json,
    set_option,
    storage_option,
    study_database_option,
)
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.waiting import waiting
from bilora_ray.library.comparing import Asked, check_comparison, comparison_of, rehearse, run_comparison
from bilora_ray.search.study.layout import Layout


@click.command()
@click.argument("file", metavar="FILE|NAME")
@set_option
@click.option("--resume", is_flag=True, help="Go on with the comparison after an interruption, or tell of it again.")
@click.option("--extend", type=click.IntRange(min=1), metavar="N", help="Go on with it, on N seeds more than it has.")
@storage_option
@study_database_option
@mlflow_option
@insecure_option
@click.option("--dry-run", is_flag=True, help="Check the file, data and models, say what would run, and stop.")
@click.option("--ray-address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray cluster.  [default: this machine]")
@json_option
def command(
    file: str,
    overrides: tuple[str, ...],
    resume: bool,
    extend: int | None,
    storage_path: Path,
    study_database: str | None,
    mlflow_uri: str | None,
    insecure: bool,
    dry_run: bool,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Compare methods as FILE says: each tuned with as many trials, then run on fresh seeds and scored once."""
    layout = Layout(absolute(storage_path), study_database)
    asked = Asked(layout, resume, extend, ray_address, mlflow_uri, insecure, dry_run)
    comparison = comparison_of(file, overrides, asked)
    with waiting("reading and checking the data and the models"):
        checks = check_comparison(comparison, asked)
    if dry_run:
        with waiting("trying what can be tried without weights"):
            rehearse(checks)
        click.echo("Nothing was started.")
        return
    with leaving_to_go_on():
        found = run_comparison(
            checks, partial(SearchProgress, starting="opening MLflow"), partial(click.secho, fg="yellow", err=True)
        )
    print_json(found)
