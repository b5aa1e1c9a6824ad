"""Fixtures of the tests of deploy/: its folder, and the tools that the test extra brings."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import options_of


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def deploy(root: Path) -> Path:
    """The folder under test."""
    return root / "deploy"


@pytest.fixture(scope="session")
def pinned(root: Path) -> dict[str, str]:
    """Package -> version, from constraints.txt."""
    lines = (root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Finds a program beside this Python or on the PATH; skips the test if there is none."""

    def find(name: str) -> str:
        found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if found is None:
            pytest.skip(f"{name} is not installed")
        return found

    return find


@pytest.fixture(scope="session")
def parse() -> Callable[[list[str]], dict[str, Any]]:
    """Reads a command line of `bilora-ray` or `ray` as the program itself does: its options, or UsageError."""

    return options_of
