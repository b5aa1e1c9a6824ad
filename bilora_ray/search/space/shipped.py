"""The space files that ship with the package, found by name from any folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bilora_ray.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parents[2]
SCHEMA = "schema.json"


def folder() -> Path:
    """Where they are: in an installed package, or beside it in a clone of the repository."""
    inside = _PACKAGE / "search_spaces"
    return inside if inside.is_dir() else _PACKAGE.parent / "search_spaces"


def shipped() -> Mapping[str, Path]:
    """Each of them by its name, which is that of the file without its suffix."""
    return {file.stem: file for file in sorted(folder().glob("*.yaml"))}


def comparisons() -> Mapping[str, Path]:
    """Each comparison file that ships by its name, as `shipped`."""
    return {file.stem: file for file in sorted((folder() / "comparisons").glob("*.yaml"))}


def space_file(name: str) -> Path:
    """The space file that a person calls `name`: a path, or one bare word, which is that of a shipped space.

    What has a suffix or a folder in it is a path, so that what a word means never depends on the current folder.

    Raises:
        UserError: a word that no shipped space has for a name.
    """
    return _named(name, shipped(), "space")


def comparison_file(name: str) -> Path:
    """As `space_file`, of comparison files."""
    return _named(name, comparisons(), "comparison")


def _named(name: str, found: Mapping[str, Path], what: str) -> Path:
    path = Path(name)
    if path.suffix or path.name != name:
        return path
    if name in found:
        return found[name]
    hint = nearest(name, found)
    raise UserError(f"no {what} '{name}' ships with bilora-ray; a file is written with its suffix or folder; {hint}")


def shipped_name(path: Path) -> str | None:
    """The name of the shipped space that is the file `path`; None if none is."""
    return path.stem if shipped().get(path.stem) == path.resolve() else None
