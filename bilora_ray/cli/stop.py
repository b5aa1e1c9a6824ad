"""`bilora-ray stop`: ends a search that runs elsewhere, or one trial of it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from bilora_ray.cli.options import (
    absolute,
    json_option,
    print_json,
    program,
    storage_option,
    study_argument,
    study_database_option,
)
from bilora_ray.errors import UserError
from bilora_ray.search.study.layout import Layout

EPILOG = """\b
Examples:
  bilora-ray stop quickstart
  bilora-ray stop quickstart --trial 7
"""
# So long a search may take to end; it hears of it within two seconds, and then tells MLflow.
WAIT_S = 60.0


@click.command(epilog=EPILOG)
@study_argument
@click.option("--trial", "number", type=int, metavar="N", help="Only this trial.  [default: the whole search]")
@storage_option
@study_database_option
@json_option
def command(study: str, number: int | None, storage_path: Path, study_database: str | None, as_json: bool) -> None:
    """Stop the search of STUDY as Ctrl-C would, or one trial of it.

    A search that is stopped can be resumed; this command waits until it has ended. A trial that is stopped ends at its
    next evaluation, and counts with what it has reached: its value and its adapter are as any other's. One that is
    queued is dropped: what was asked for is not tried. A search that trains its finalists is stopped with them.
    """
    from bilora_ray.search.study.steering.requests import await_end, drop, is_searched, stop_study, stop_trial
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import finalists_of, steered_study

    layout = Layout(absolute(storage_path), study_database)
    ended = dropped = False
    with naming_the_database(layout, then=""):
        found, finalists = steered_study(layout, study), finalists_of(layout, study)
        both = [found] if finalists is None else [found, steered_study(layout, finalists)]
        runs = any(is_searched(one.study, layout) for one in both)
        if number is not None:
            with layout.choosing(study):
                dropped = drop(found.study, number)
            if not dropped:
                stop_trial(found.study, number, found.chosen(number).status)
        elif not runs and study_database is None:
            raise UserError(f"study '{study}': no process runs it")
        else:
            for one in both:
                stop_study(one.study)
            ended = all(await_end(one.study, layout, WAIT_S) for one in both)
    if as_json:
        print_json({"study": study, "trial": number, "running": runs, "ended": ended, "dropped": dropped})
    elif dropped:
        click.echo(f"Study '{study}': trial {number} is queued no more; it will have settings that are proposed.")
    elif number is not None:
        when = "at its next evaluation" if runs else "once the study is resumed, which no process runs now"
        click.echo(f"Study '{study}': trial {number} ends {when}.")
    elif ended:
        click.echo(f"Study '{study}': stopped; what is done is kept. Go on: {_tune()} --resume")
    else:
        click.echo(f"Study '{study}': was asked to stop, and has not ended after {WAIT_S:.0f} s.")


def _tune() -> str:
    return f"{shlex.join(program())} tune ..."
