"""A space as a caller gives it: a file, or a dict of the same shape; with settings on top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilora_ray.errors import UserError, first_line
from bilora_ray.paths import Locate, locate_here
from bilora_ray.search.space import Space
from bilora_ray.search.space.shipped import space_file
from bilora_ray.search.space_file import SECTIONS, checked_space, load_space, sections_of

# A space file, the name of one that ships, or what one holds: the sections `study`, `trial` and `resources`.
SpaceLike = str | Path | Mapping[str, Any]
# What is said to be wrong with a dict, which has no file's name.
IN_PYTHON = Path("space")


def read_space(space: SpaceLike | None, overrides: Sequence[str] = (), locate: Locate = locate_here) -> Space:
    """The checked space: see `load_space`. Relative paths in a dict start at the current folder."""
    if isinstance(space, Mapping):
        return checked_space(sections_of(space, IN_PYTHON), IN_PYTHON, overrides, locate)
    return load_space(space_file(space) if isinstance(space, str) else space, overrides, locate)


def space_to_search(
    space: SpaceLike,
    overrides: Sequence[str],
    num_trials: int | None,
    max_concurrent: int | None,
    locate: Locate = locate_here,
) -> Space:
    """The checked space that the options name. UserError if it is wrong, or if it leaves nothing to search."""
    flags = [("num_trials", num_trials), ("max_concurrent", max_concurrent)]
    shortcuts = tuple(f"study.{key}={value}" for key, value in flags if value is not None)
    found = read_space(space, (*overrides, *shortcuts), locate)
    if not found.distributions:
        raise UserError(f"{found.path}: no setting has a distribution, so there is nothing to search: bilora-ray train")
    return found


def of_settings(given: SpaceLike | None) -> SpaceLike | None:
    """`given`, or the space around it if it is a dict of a trial's settings alone."""
    if isinstance(given, Mapping) and not given.keys() & set(SECTIONS):
        return {"study": {}, "trial": given}
    return given


def as_overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """`settings` as texts of --set. UserError if one is no value of a setting."""
    return tuple(f"{key}={_as_json(key, value)}" for key, value in settings.items())


def _as_json(key: str, value: Any) -> str:
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: cannot be written as JSON ({first_line(error)})") from None


def _plain(value: Any) -> Any:
    """What JSON lacks: numbers of a DataFrame, paths."""
    return value.item() if hasattr(value, "item") else str(value)
