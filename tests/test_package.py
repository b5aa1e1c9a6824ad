"""What an installed package holds beside its Python: a wheel takes only the files that it is told of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bilora_ray"
# What a wheel is built from.
SOURCES = ("bilora_ray", "search_spaces", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel, built of a copy of the sources, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = ROOT / name, folder / "sources" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "sources")]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    with ZipFile(built) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_every_file_of_the_package_is_in_a_wheel(wheel: set[str]) -> None:
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {name for name in wheel if "/search_spaces/" not in name} == {
        file.relative_to(ROOT).as_posix() for file in files
    }


def test_every_shipped_space_is_in_a_wheel_with_its_schema(wheel: set[str]) -> None:
    there = (file for file in (ROOT / "search_spaces").rglob("*") if file.is_file())
    spaces = {f"bilora_ray/{file.relative_to(ROOT).as_posix()}" for file in there}
    assert {f"bilora_ray/search_spaces/{name}" for name in ("schema.json", "comparisons/quickstart.yaml")} <= spaces
    assert {name for name in wheel if "/search_spaces/" in name} == spaces


def test_type_checkers_of_others_are_told_to_read_the_annotations(wheel: set[str]) -> None:
    assert "bilora_ray/py.typed" in wheel
