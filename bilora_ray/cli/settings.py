"""`bilora-ray settings`: the reference of every key of a space file."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bilora_ray.checking import Settings
from bilora_ray.cli.options import json_option, print_json
from bilora_ray.cli.schema import schema
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, nearest
from bilora_ray.search.space import ResourceConfig, StudyConfig

EPILOG = """\b
Examples:
  bilora-ray settings
  bilora-ray settings rho
  bilora-ray settings --schema
"""

SECTIONS: dict[str, type[Settings]] = {"study": StudyConfig, "trial": TrialConfig, "resources": ResourceConfig}


@click.command(epilog=EPILOG)
@click.argument("word", required=False)
@click.option(
    "--schema", "as_schema", is_flag=True, help="Print the JSON Schema by which editors complete space files."
)
@json_option
def command(word: str | None, as_schema: bool, as_json: bool) -> None:
    """List the keys of a space file with their defaults, or those that WORD occurs in."""
    if as_schema:
        if word is not None or as_json:
            raise UserError("--schema: is of all keys, and JSON already; give it alone")
        print_json(schema())
        return
    found = [row for row in rows() if word is None or word in row["key"] or word in row["description"]]
    if not found:
        raise UserError(f"no key '{word}'; {nearest(word or '', {row['key'] for row in rows()})}")
    if as_json:
        print_json(found)
        return
    section = None
    for row in found:
        if row["section"] != section:
            section = row["section"]
            click.secho(f"{section}:", bold=True)
        allowed = f" ({row['allowed']})" if row["allowed"] else ""
        click.echo(f"  {row['key']:<28} {row['default']:<16} {row['description']}{allowed}")


def rows() -> list[dict[str, str]]:
    """Section, key, default, description and allowed words of every key, in the order of their declaration."""
    return [
        {
            "section": section,
            "key": key,
            "default": _default(field),
            "description": field.description or "",
            "allowed": ", ".join(map(str, _words(field.annotation))),
        }
        for section, kind in SECTIONS.items()
        for key, field in kind.model_fields.items()
    ]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in (None, ()):
        return "-"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _words(annotation: Any) -> tuple[Any, ...]:
    """The words that `annotation` allows: of each Literal in it, as in `Literal["nf4", "int8"] | None`."""
    parts = get_args(annotation)
    return parts if get_origin(annotation) is Literal else tuple(word for part in parts for word in _words(part))
