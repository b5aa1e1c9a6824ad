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
    where_adapter_is,
)
from bilora_ray.errors import MachineError, UserError, first_line
from bilora_ray.paths import have_home

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
    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study, refuse_finalists

    layout, searched = Layout(absolute(storage_path), study_database), study
    have_home()
    if number is not None and prefer is not None:
        raise UserError("--prefer: --trial names the trial already; leave one out")
    with naming_the_database(layout, then=""):
        found = load_study(layout, study)
        if number is None:
            refuse_finalists(found)
        _check_new(output)
        record = found.chosen(number, prefer)
        finals = finals_of(found) if number is None and prefer is None else None
    unjudged = "the best single run is taken, for its finalists are not all trained"
    told = [unjudged] if finals is not None and finals.winner is None else []
    if finals is not None and finals.winner is not None:
        study, found, record = finals.study.space.study.name, finals.study, finals.winner
    adapter = where_adapter_is(found, record)
    if record.removed:
        again = f"`bilora-ray train --study {study} --trial {record.number} --name NEW` trains it again"
        raise UserError(
            f"study '{study}': the adapter of trial {record.number} was removed by study.{record.removed}; {again}"
        )
    if record.adapter is None and record.value is None:
        raise UserError(f"study '{study}': trial {record.number} has no adapter; it ended before its first evaluation")
    if record.adapter is None or not adapter.is_dir():
        raise UserError(f"study '{study}': the adapter of trial {record.number} is gone; it was in {adapter}")

    if merge:
        from bilora_ray.quiet import quiet

        quiet()
    from bilora_ray.release.export import export_adapter, export_merged

    origin = {"study": study, "trial": record.number, found.objective.metric: record.value, **record.values}
    try:
        with telling_of_gpu_memory("; hide it with CUDA_VISIBLE_DEVICES= to merge in main memory"):
            notes = (export_merged if merge else export_adapter)(adapter, absolute(output), origin) or []
        notes = [*told, *notes]
    except OSError as error:
        raise MachineError(f"--output {output}: cannot be written ({error.strerror or first_line(error)})") from None
    if as_json:
        print_json({"output": str(absolute(output)), "merged": merge, **origin, **({"notes": notes} if notes else {})})
    else:
        for note in notes:
            click.secho(f"Note: {note}", fg="yellow", err=True)
        which = f"trial {record.number}" if study == searched else f"trial {record.number} of '{study}'"
        click.echo(f"{'Merged model' if merge else 'Adapter'} of {which} is in {output}")
        others = [one.metric for one in found.objectives if one.metric != (prefer or found.objective.metric)]
        if number is None and others:
            chosen_by = prefer or found.objective.metric
            click.echo(f"It is the best by {chosen_by}; --prefer {others[0]} or --trial N takes another of the front")


def _check_new(output: Path) -> None:
    try:
        found = output.exists() and any(output.iterdir() if output.is_dir() else [output])
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror})") from None
    if found:
        raise UserError(f"--output {output}: exists already")
