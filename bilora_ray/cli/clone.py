"""`bilora-ray clone`: a study's space, for another study."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from bilora_ray.cli.options import (
    absolute,
    json_option,
    print_json,
    program,
    set_option,
    storage_option,
    study_argument,
    study_database_option,
)
from bilora_ray.errors import UserError
from bilora_ray.search.space_file import checked_space
from bilora_ray.search.study.layout import Layout

EPILOG = """\b
Examples:
  bilora-ray clone quickstart quickstart-2
  bilora-ray clone quickstart wider --set 'rank={choice: [8, 16, 32]}' --output wider.yaml
"""


@click.command(epilog=EPILOG)
@study_argument
@click.argument("new")
@set_option
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="The file.  [default: NEW.yaml]")
@storage_option
@study_database_option
@json_option
def command(
    study: str,
    new: str,
    overrides: tuple[str, ...],
    output: Path | None,
    storage_path: Path,
    study_database: str | None,
    as_json: bool,
) -> None:
    """Write the space of STUDY down as a space file for a study NEW, with changed settings where --set says so.

    Data and models are those that the trials of STUDY have read, by their absolute paths and commits. Nothing is
    started: the file is there to be looked at, and `bilora-ray tune --space` begins the study.
    """
    file = output or Path(f"{new}.yaml")
    if file.exists():
        raise UserError(f"--output {file}: exists; name another file")

    from bilora_ray.search.study.steering.copying import sections_of, written
    from bilora_ray.search.study.storage import naming_the_database, study_names
    from bilora_ray.search.study.studies import load_study, refuse_trained_anew

    layout = Layout(absolute(storage_path), study_database)
    with naming_the_database(layout, then=""):
        found = load_study(layout, study)
        refuse_trained_anew(found)
        if new in study_names(layout):
            raise UserError(f"NEW: a study '{new}' exists; give this one another name")
        sections = sections_of(found.space)
    sections["study"]["name"] = new
    text = written(checked_space(sections, file, overrides))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {file}: cannot be written ({error.strerror})") from None
    if as_json:
        print_json({"study": new, "space": str(file)})
    else:
        click.echo(
            f"{file} searches as study '{study}' did. Begin: {shlex.join([*program(), 'tune', '--space', str(file)])}"
        )
