"""`bilora-ray init`: from a data file to a space file that is ready to run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import yaml

from bilora_ray.cli.options import program, set_option
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS
from bilora_ray.search.space import shipped
from bilora_ray.search.space_file import SECTIONS, checked_space, parse_override

SCHEMA = "bilora-ray.schema.json"
EPILOG = """\b
Examples:
  bilora-ray init --data mine.csv
  bilora-ray init --data mine.jsonl --model Qwen/Qwen2.5-0.5B --output my_space.yaml
  bilora-ray init --data mine.csv --task sequence-classification --set label_column=category
"""


@click.command(epilog=EPILOG)
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="What to learn from: a file, folder or pattern of files, or a Hub dataset.",
)
@click.option("--model", metavar="MODEL", help="Hub id or local folder.  [default: one that suits task and machine]")
@click.option(
    "--task", type=click.Choice(list(TASK_FACTS)), metavar="TASK", help="What is learned.  [default: by the columns]"
)
@set_option
@click.option(
    "--output",
    default="my_space.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The space file.",
)
def command(data: str, model: str | None, task: Any, overrides: tuple[str, ...], output: Path) -> None:
    """Look at a data file and write a space file for it, ready for tune, with a comment on each decision.

    What could be meant in several ways is told, with the option that decides it. Nothing is overwritten.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; name another file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no such folder: {output.parent}")
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: a space file is called NAME.yaml")
    given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for override in overrides:
        section, key, value = parse_override(override)
        given[section][key] = value
    for key, option in (("train_data", "--data"), ("model_name_or_path", "--model"), ("task", "--task")):
        if key in given["trial"]:
            raise UserError(f"--set {key}: is {option} here")

    from bilora_ray.search.drafting.draft import draft
    from bilora_ray.search.drafting.text import written
    from bilora_ray.search.preflight import look
    from bilora_ray.search.readiness.machine import gpu_count

    found = draft(data, model, task, given, output, gpu_count())
    text = written(found, SCHEMA)
    look(checked_space(yaml.safe_load(text), output, ()))
    with output.open("x", encoding="utf-8") as file:
        file.write(text)
    schema = output.with_name(SCHEMA)
    if not schema.exists():
        shutil.copyfile(shipped.folder() / shipped.SCHEMA, schema)
    for line in found.told:
        click.echo(line)
    for line in found.notes:
        click.secho(f"Note: {line}", fg="yellow")
    for line in found.doubts:
        click.secho(f"Or: {line}", fg="yellow")
    words, file_name = shlex.join(program()), shlex.quote(str(output))
    click.echo(f"Wrote {output}; editors complete it by {schema.name} beside it")
    click.echo(f"Next   {words} tune --space {file_name}   (--dry-run first reads every row, and starts nothing)")
