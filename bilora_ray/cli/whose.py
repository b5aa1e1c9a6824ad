"""Whose the answers of a server are: the adapter's, or its base model's."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.answers import print_notes
from bilora_ray.cli.options import print_json
from bilora_ray.cli.tables import in_quotes

if TYPE_CHECKING:
    from bilora_ray.release.server import Server, Verdict
    from bilora_ray.training.data.sources import Record
    from bilora_ray.training.prediction.answers import Asked


def ask_server(
    server: Server, model: str, asked: Asked, records: Collection[Record], notes: Sequence[str], as_json: bool
) -> None:
    """Say whose the server's answers are; exit code 1 where they are not the adapter's."""
    from bilora_ray.release.server import compare

    if not as_json:
        print_notes(notes)
    verdict = compare(server, model, asked, records)
    if as_json:
        print_json({**verdict.as_dict(), **({"notes": notes} if notes else {})})
    else:
        _print_verdict(verdict)
    if verdict.whose != "adapter":
        sys.exit(1)


def _print_verdict(verdict: Verdict) -> None:
    first, *others = verdict.lines()
    click.secho(f"Model '{verdict.model}': {first}", fg="green" if verdict.whose == "adapter" else "red")
    for line in others:
        click.echo(f"{line[0].upper()}{line[1:]}.")
    for row in [row for row in verdict.rows if row.whose != "adapter"][:1]:
        for whose in ("prompt", "server", "adapter", "base_model"):
            click.echo(f"  {whose.replace('_', ' '):<11} {in_quotes(getattr(row, whose))}")
