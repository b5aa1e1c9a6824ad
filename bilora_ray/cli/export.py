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
    telling_of_gpu_memory,
    trial_option,
)
from bilora_ray.library.exporting import choose, write
from bilora_ray.search.study.layout import Layout

EPILOG = """\b
Examples:
  bilora-ray export quickstart --output my-adapter
  bilora-ray export quickstart --trial 3 --output merged-model --merge
  bilora-ray export quickstart --prefer train_runtime --output my-adapter
"""


@click.command(epilog=EPILOG)
@study_argument
@trial_option
@click.option(
    "--prefer",
    metavar="METRIC",
    help="Of several objectives the one by which the trial is the best of the front.  [default: the first]",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="A new folder.")
@click.option("--merge", is_flag=True, help="Write the base model with the adapter merged in, and its tokenizer.")
@storage_option
@study_database_option
@json_option
def command(
    study: str,
    number: int | None,
    prefer: str | None,
    output: Path,
    merge: bool,
    storage_path: Path,
    study_database: str | None,
    as_json: bool,
) -> None:
    """Copy out the adapter of the best trial, or of any: an ordinary PEFT LoRA adapter.

    Of a study with finalists it is the winner's: of its runs the one with the middle score, which the reported one is
    of.
    """
    layout = Layout(absolute(storage_path), study_database)
    chosen = choose(layout, study, number, prefer, output)
    with telling_of_gpu_memory("; hide it with CUDA_VISIBLE_DEVICES= to merge in main memory"):
        exported = write(chosen, output, merge)
    if as_json:
        notes = {"notes": exported.notes} if exported.notes else {}
        print_json({"output": str(exported.output), "merged": merge, **exported.origin, **notes})
        return
    for note in exported.notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
    which = f"trial {chosen.record.number}"
    if chosen.study != study:
        which += f" of '{chosen.study}'"
    click.echo(f"{'Merged model' if merge else 'Adapter'} of {which} is in {output}")
    by = prefer or chosen.objectives[0]
    if number is None and (others := [metric for metric in chosen.objectives if metric != by]):
        click.echo(f"It is the best by {by}; --prefer {others[0]} or --trial N takes another of the front")
