"""`bilora-ray validate`: is this space file right? Imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path

import click

from bilora_ray.cli.options import json_option, print_json, set_option
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space

EPILOG = """\b
Example:
  bilora-ray validate search_spaces/llama.yaml
"""


@click.command(epilog=EPILOG)
@click.argument("space_path", metavar="FILE", type=click.Path(path_type=Path))
@set_option
@json_option
def command(space_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a space file in a moment: keys, types, ranges, local paths, and the first rows of local data."""
    from bilora_ray.search.preflight import look

    space = load_space(space_path, overrides)
    look(space)
    if as_json:
        print_json(describe(space))
        return
    click.echo(f"{space_path} is valid: study '{space.study.name}', {space.study.num_trials} trials over")
    for key, distribution in space.distributions.items():
        click.echo(f"  {key:<28} {distribution}")
    if not space.distributions:
        click.echo("  nothing: no setting has a distribution, so `bilora-ray train` runs it and `tune` does not")


def describe(space: Space) -> dict[str, object]:
    """A space as JSON."""
    return {
        "study": space.study.model_dump(),
        "resources": space.resources.model_dump(),
        "fixed": space.fixed,
        "distributions": {key: d.model_dump(exclude_none=True) for key, d in space.distributions.items()},
    }
