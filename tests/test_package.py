"""What an installed package holds beside its Python: a wheel takes only the files that pyproject.toml names."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bilora_ray"


def packed() -> set[Path]:
    """The files that setuptools packs of those that are no Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]
    return {
        file
        for package, globs in patterns.items()
        for pattern in globs
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }


def test_every_file_of_the_package_is_in_a_wheel() -> None:
    others = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in others if file.suffix != ".py"} == packed()


def test_type_checkers_of_others_are_told_to_read_the_annotations() -> None:
    assert PACKAGE / "py.typed" in packed()
