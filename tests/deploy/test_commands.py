"""Every `bilora-ray` and `ray` command line in deploy/ is one that the real command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import documents
import pytest
import yaml
from documents import commands_of

Parse = Callable[[list[str]], dict[str, Any]]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def commands_in(path: Path) -> list[list[str]]:
    """The commands in a file of deploy/."""
    text = path.read_text()
    if path.suffix == ".md":
        return documents.commands_in(text)
    if path.suffix == ".yaml":
        texts = [string for document in yaml.safe_load_all(text) for string in _strings(document)]
    else:
        texts = [text]
    return [command for text in texts for command in commands_of(text)]


def _all(deploy: Path) -> list[tuple[str, list[str]]]:
    files = [path for path in sorted(deploy.rglob("*")) if path.suffix in (".md", ".yaml", ".sh")]
    return [(path.name, command) for path in files for command in commands_in(path)]


def test_every_command_line_is_understood(deploy: Path, parse: Parse) -> None:
    found = _all(deploy)
    for file, command in found:
        try:
            parse(command)
        except click.UsageError as error:
            pytest.fail(f"{file}: {shlex.join(command)}: {error.format_message()}")
    seen = {(file, *command[:2]) for file, command in found}
    assert seen >= {
        ("rayjob.yaml", "bilora-ray", "tune"),
        ("ray-cluster.yaml", "ray", "start"),
        ("slurm.sh", "bilora-ray", "tune"),
        ("slurm.sh", "bilora-ray", "validate"),
        ("slurm.sh", "ray", "start"),
        ("README.md", "bilora-ray", "tune"),
        ("README.md", "bilora-ray", "show"),
        ("README.md", "bilora-ray", "ui"),
        ("README.md", "ray", "up"),
        ("README.md", "ray", "exec"),
        ("README.md", "ray", "job"),
        ("README.md", "ray", "down"),
    }


def test_no_command_is_overlooked(deploy: Path) -> None:
    """The reader above finds as many `bilora-ray tune --` as a plain search does."""
    for path in (deploy / "README.md", deploy / "slurm.sh", deploy / "kubernetes" / "rayjob.yaml"):
        plain = len(re.findall(r"bilora-ray tune --", path.read_text()))
        assert sum(command[:2] == ["bilora-ray", "tune"] for command in commands_in(path)) == plain > 0


def test_a_wrong_option_is_not_understood(parse: Parse) -> None:
    with pytest.raises(click.UsageError, match="--storage"):
        parse(["bilora-ray", "tune", "--space", "s.yaml", "--storage", "x"])
    *_, command = commands_of(
        "kubectl exec pod -- ray job submit -- \\\n bilora-ray tune --no-such-option 'a b' | tee log"
    )
    with pytest.raises(click.UsageError, match="--no-such-option"):
        parse(command)


def test_searches_on_clusters_share_their_storage_and_say_how_wide_they_are(deploy: Path, parse: Parse) -> None:
    for file, command in _all(deploy):
        if command[:2] != ["bilora-ray", "tune"] or "slurm" in file:
            continue
        options = parse(command)
        if options["ray_address"]:
            assert (options["ray_address"], str(options["storage_path"])) == ("auto", "/shared/runs"), file
            assert options["max_concurrent"] == 8, file
