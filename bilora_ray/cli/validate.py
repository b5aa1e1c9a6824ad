"""`bilora-ray validate`: is this space file right? Imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bilora_ray.cli.options import SPACE, json_option, print_json, set_option
from bilora_ray.search.space import Space, setting_of
from bilora_ray.search.space_file import load_space
from bilora_ray.settings import FACTS

EPILOG = """\b
Examples:
  bilora-ray validate my_space.yaml
  bilora-ray validate llama
"""


@click.command(epilog=EPILOG)
@click.argument("space_path", metavar="FILE|NAME", type=SPACE)
@set_option
@json_option
def command(space_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a space file in a moment: keys, types, ranges, local paths, and the first rows of local data.

    A word without a suffix or a folder names a space that ships, such as quickstart, whatever is in the current folder.
    """
    from bilora_ray.search.preflight import look

    space = load_space(space_path, overrides)
    look(space)
    if as_json:
        print_json(describe(space))
        return
    click.echo(f"{space_path} is valid: study '{space.study.name}', {space.study.num_trials} trials")
    _print(space)
    for note in space.notes:
        click.secho(f"Note: {note}", fg="yellow")
    if not space.distributions:
        click.echo("no setting has a distribution, so `bilora-ray train` runs it and `tune` does not")


def _print(space: Space) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    told = rows(space)
    names = [name for name in ("setting", "kind", "range", "when", "points") if any(row[name] for row in told)]
    columns = (Column(name, overflow="fold", justify="right" if name == "points" else "left") for name in names)
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in told:
        table.add_row(*(Text(str(row[name] or "")) for name in names))
    console = Console(highlight=False)
    console.print(table)
    if space.distributions:
        size, open_ = space.size(), f"continuous in {', '.join(continuous(space))}"
        console.print(f"size: {f'{size} different trials' if size is not None else open_}")
    for point in space.points_to_evaluate:
        text = ", ".join(f"{key}: {value}" for key, value in point.items())
        console.print(f"runs first: {{{text}}}", markup=False, soft_wrap=True)


def rows(space: Space) -> list[dict[str, Any]]:
    """The space as a table: what is searched or derived, in the order in which it is decided, then what is fixed.

    Returns:
        Of each row the `setting`; its `kind`: choice, range, log range, derived or fixed; its `range` and `when` it is
        asked for, in words; and how many `points` it is drawn from, a number or "continuous"; None: it is not drawn.
    """
    found: list[dict[str, Any]] = []
    for name, part in space.parts.items():
        kind = "derived" if name in space.expressions else "fixed" if name in space.given else part.kind
        points = (space.count(name) or "continuous") if name in space.distributions else None
        when = " and ".join(filter(None, (_methods(setting_of(name), space), part.condition)))
        found.append({"setting": setting_of(name), "kind": kind, "range": part.range, "when": when, "points": points})
    for key, value in space.fixed.items():
        found.append({"setting": key, "kind": "fixed", "range": str(value), "when": "", "points": None})
    return found


def _methods(setting: str, space: Space) -> str:
    """Which methods read `setting`, where the space has others too and no condition says it."""
    others = {method for name in space.distributions if name == "method" for method in space.ends(name)}
    of = FACTS[setting].of
    conditions = [part.when for name, part in space.parts.items() if setting_of(name) == setting]
    said = all("method" in when for when in conditions)
    return "" if said or others <= set(of) else f"method is {' or '.join(method for method in of if method in others)}"


def continuous(space: Space) -> list[str]:
    """The settings that are drawn from a continuous range."""
    return list(dict.fromkeys(setting_of(name) for name in space.distributions if space.count(name) is None))


def describe(space: Space) -> dict[str, object]:
    """A space as JSON."""
    return {
        "study": space.study.model_dump(),
        "resources": space.resources.model_dump(),
        "fixed": space.fixed,
        "distributions": {name: part.described() for name, part in space.distributions.items()},
        "given": {name: part.described() for name, part in space.given.items()},
        "settings": rows(space),
        "size": {"trials": space.size(), "continuous": continuous(space)},
        "points_to_evaluate": list(space.points_to_evaluate),
        "notes": list(space.notes),
    }
