"""`bilora-ray export`: a trial's adapter as PEFT, vLLM and the Hub take it."""

from __future__ import annotations

from pathlib import Path

import click

from bilora_ray.cli.options import (
    absolute,
    json_option,
    print_json,
    storage_option,
    study_argument,
    study_database_option,
    trial_option,
)
from bilora_ray.errors import UserError, first_line

EPILOG = """\b
Examples:
  bilora-ray export quickstart --output my-adapter
  bilora-ray export quickstart --trial 3 --output merged-model --merge
"""


@click.command(epilog=EPILOG)
@study_argument
@trial_option
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="A new folder.")
@click.option("--merge", is_flag=True, help="Write the base model with the adapter merged in, and its tokenizer.")
@storage_option
@study_database_option
@json_option
def command(
    study: str,
    number: int | None,
    output: Path,
    merge: bool,
    storage_path: Path,
    study_database: str | None,
    as_json: bool,
) -> None:
    """Copy out the adapter of the best trial, or of any: an ordinary PEFT LoRA adapter."""
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study

    layout = Layout(absolute(storage_path), study_database)
    with naming_the_database(layout):
        found = load_study(layout, study)
        record = found.chosen(number)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"--output {output}: exists already")
    if record.adapter is None:
        raise UserError(f"study '{study}': trial {record.number} has no adapter; it ended before its first evaluation")

    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.release.export import export_adapter, export_merged

    origin = {"study": study, "trial": record.number, found.objective.metric: record.value}
    try:
        (export_merged if merge else export_adapter)(record.adapter, absolute(output), origin)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or first_line(error)})") from None
    if as_json:
        print_json({"output": str(absolute(output)), "merged": merge, **origin})
    else:
        click.echo(f"{'Merged model' if merge else 'Adapter'} of trial {record.number} is in {output}")
