"""`bilora-ray enqueue`: what a study tries next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bilora_ray.checking import nearest_setting
from bilora_ray.cli.options import (
    absolute,
    json_option,
    print_json,
    storage_option,
    study_argument,
    study_database_option,
)
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.search.space_file import absolute_sources, parse_override
from bilora_ray.search.study.layout import Layout
from bilora_ray.settings import coerce

EPILOG = """\b
Examples:
  bilora-ray enqueue quickstart rank=16 rho=0.1
  bilora-ray enqueue quickstart method=lora learning_rate=3e-4
"""


@click.command(epilog=EPILOG)
@study_argument
@click.argument("settings", nargs=-1, required=True, metavar="KEY=VALUE...")
@storage_option
@study_database_option
@json_option
def command(
    study: str, settings: tuple[str, ...], storage_path: Path, study_database: str | None, as_json: bool
) -> None:
    """Have the next trial of STUDY get these settings; what they leave open is proposed as ever.

    The study may be running, or not. Whoever runs it begins with what was asked for first.
    """
    values = _values(settings)

    from bilora_ray.search.study.steering.requests import checked, enqueue
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import has_begun, refuse_trained_anew, steered_study

    layout = Layout(absolute(storage_path), study_database)
    with naming_the_database(layout, then=""):
        found = steered_study(layout, study)
        refuse_trained_anew(found)
        parameters = checked(found.space, values)
        with layout.choosing(study):
            if not has_begun(study, layout):  # tune makes it anew, without what was asked of it
                raise UserError(
                    f"study '{study}': no trial of it has begun; ask once one has, or in points_to_evaluate"
                )
            waiting = enqueue(found.study, parameters)
        left = found.space.study.num_trials - len(found.records())
        end = found.end()
    behind = [*waiting.before, waiting.number][max(0, left) :]
    if as_json:
        print_json({"study": study, "trial": waiting.number, "settings": values, "after": waiting.before})
        return
    after = f", after {_in_words(waiting.before)}" if waiting.before else " is the next one"
    click.echo(f"Study '{study}': trial {waiting.number}{after}.")
    go_on = f"--extend {len(behind)}" if waiting.number in behind else "--resume"
    if end is not None:
        click.echo(f"The study ended by {end.line}. With another {end.by}, or without one, {go_on} begins the trial.")
    elif waiting.number in behind:
        click.echo(f"The study asks for no more trials: bilora-ray tune ... {go_on} begins it.")


def _values(settings: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in settings:
        try:
            section, key, value = parse_override(text)
        except UserError as error:
            raise UserError(str(error).removeprefix("--set ")) from None
        if section != "trial":
            raise UserError(f"{text}: only a trial's settings can be those of a trial")
        if key not in TrialConfig.model_fields:
            raise UserError(f"{text}: unknown key '{key}'; {nearest_setting(key, TrialConfig)}")
        if key in values:
            raise UserError(f"{text}: '{key}' is given twice")
        values[key] = coerce(key, value, key)
    return absolute_sources(values, Path.cwd(), "enqueue")


def _in_words(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
