"""`bilora-ray register`: an adapter as a version of a model in MLflow's registry."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.addresses import masked
from bilora_ray.cli.options import (
    absolute,
    json_option,
    mlflow_option,
    print_json,
    storage_option,
    study_argument,
    study_database_option,
    trial_option,
)
from bilora_ray.errors import UserError
from bilora_ray.paths import have_home

if TYPE_CHECKING:
    from bilora_ray.records import TrialRecord
    from bilora_ray.search.study.view import StudyView

EPILOG = """\b
Examples:
  bilora-ray register quickstart --name word-problems --alias champion
  bilora-ray register quickstart --trial 3 --name word-problems
"""
# What MLflow takes; the first is a part of a URI and of a path.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]*")
ALIAS = re.compile(r"(?!v\d+$)(?!latest$)[A-Za-z0-9_-]+", re.IGNORECASE)


@click.command(epilog=EPILOG)
@study_argument
@trial_option
@click.option("--name", required=True, metavar="NAME", help="The model in the registry, made if missing.")
@click.option("--alias", metavar="ALIAS", help="Have this alias, such as champion, name the version.")
@storage_option
@study_database_option
@mlflow_option
@json_option
def command(
    study: str,
    number: int | None,
    name: str,
    alias: str | None,
    storage_path: Path,
    study_database: str | None,
    mlflow_uri: str | None,
    as_json: bool,
) -> None:
    """Register the adapter of the best trial, or of any, in MLflow, which loads, serves and versions it.

    It has a signature, an example, and the base model's name, commit and licence. The base model's weights are not
    copied. Registered twice it is one version.
    """
    _check("--name", name, NAME, "letters, digits, '_', '-', '.' and spaces")
    if alias is not None:
        _check("--alias", alias, ALIAS, "letters, digits, '_' and '-', and neither 'latest' nor 'v1'")
    have_home()
    from bilora_ray.library.exporting import meant
    from bilora_ray.search.session import artifacts_of, candidate_of, study_info
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.tracking.mlflow_tracker import default_uri
    from bilora_ray.tracking.registry import register

    layout = Layout(absolute(storage_path), study_database)
    with naming_the_database(layout, then=""):
        one = meant(layout, study, number)
        found, record = one.study, one.record
        candidate, info = candidate_of(found, record), study_info(found, {})
    uri = mlflow_uri or default_uri(layout.storage_path)
    made = register(
        uri,
        found.space.study.project,
        artifacts_of(layout),
        info,
        candidate,
        name,
        alias,
        _described(found, record),
    )
    address = f"models:/{name}@{alias}" if alias else f"models:/{name}/{made.version}"
    if as_json:
        notes = {"notes": one.notes} if one.notes else {}
        print_json({**asdict(made), "uri": address, "alias": alias, **candidate.served.facts, **notes})
        return
    for note in one.notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
    told = "is" if made.is_new else "was already"
    click.echo(f"Trial {record.number} of '{found.space.study.name}' {told} version {made.version} of {name}")
    click.echo(f"Load it  mlflow.pyfunc.load_model({address!r})")
    where, what = shlex.quote(masked(uri)), shlex.quote(address)
    click.echo(f"Serve it MLFLOW_TRACKING_URI={where} mlflow models serve -m {what} --env-manager local")


def _described(study: StudyView, record: TrialRecord) -> str:
    """What stays true of a version: an alias may name another one tomorrow."""
    values = "".join(f", {metric} {value:.6g}" for metric, value in record.values.items())
    config = study.config(record.number)
    base = f"`{config.model_name_or_path}`" + (f" at `{config.model_revision}`" if config.model_revision else "")
    what = f"{base}, fully fine-tuned" if config.leaves_model else f"LoRA adapter of {base}"
    return f"{what}: trial {record.number} of study `{study.space.study.name}`{values}"


def _check(option: str, text: str, allowed: re.Pattern[str], in_words: str) -> None:
    if not allowed.fullmatch(text):
        raise UserError(f"{option} {text}: MLflow allows {in_words}")
