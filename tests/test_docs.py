"""What the documentation has a reader type is taken, and what it says is what the tests show."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import reference_tables
import yaml
from click.testing import CliRunner
from data_table import PAGE, page_with, tables
from documents import ROOT, blocks, commands_in, documents, options_of

import bilora_ray
from bilora_ray.cli.main import COMMANDS, main
from bilora_ray.cli.settings import rows as settings
from bilora_ray.facts import METHOD_NAMES, Primary
from bilora_ray.measures import EXACT_MATCH, SHARPNESS, TASK_FACTS
from bilora_ray.search.comparing.file import ComparisonConfig, checked_comparison, sections_of
from bilora_ray.search.preflight import preflight
from bilora_ray.search.space import Range
from bilora_ray.search.space_file import checked_space, load_space

# What a block that shows a part of a space file is a part of.
BASE = {
    "study": {"name": "base"},
    "trial": {
        "model_name_or_path": "builtin:quickstart/model",
        "task": "causal-lm",
        "train_data": "builtin:quickstart/train.jsonl",
        "rank": {"choice": [4, 8]},
    },
}
EACH = pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)


def test_the_tables_of_data_are_those_of_the_cases() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(text, tables()) == text, "python tests/data_table.py writes them anew"
    assert sum(table.count("\n") - 2 for table in tables().values()) >= 60


def test_the_tables_of_settings_and_metrics_are_those_of_the_code() -> None:
    for page, found in reference_tables.pages().items():
        text = page.read_text(encoding="utf-8")
        assert page_with(text, found) == text, "python tests/reference_tables.py writes them anew"
        assert all(table in text for table in found.values())
    assert set(reference_tables.MEANINGS) == {
        EXACT_MATCH,
        SHARPNESS,
        *(name for facts in TASK_FACTS.values() for name in facts.metrics),
    }


def test_the_page_of_methods_has_each() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    _, primaries, methods = re.split(r"^## What the primary is|^## What it is compared with", text, flags=re.M)
    for part, names in ((primaries, get_args(Primary)), (methods, METHOD_NAMES)):
        rows = re.findall(r"^\| (`[^|]+) \|", part, re.M)
        assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == set(names)


@EACH
def test_a_page_names_settings_that_there_are(document: Path) -> None:
    text = document.read_text(encoding="utf-8").partition("<!-- files -->")[0]
    named = set(re.findall(r"`([a-z0-9_]+): ", re.sub(r"^### .*$", "", text, flags=re.M)))
    known = {
        *(row["key"] for row in settings()),
        *(row["section"] for row in settings()),
        *Range.model_fields,
        *ComparisonConfig.model_fields,
    }
    assert named <= known


# Commands


def _commands() -> list[tuple[Path, list[str]]]:
    return [(path, command) for path in documents() for command in commands_in(path.read_text(encoding="utf-8"))]


def test_every_command_is_one_that_the_command_line_takes() -> None:
    found = _commands()
    for document, command in found:
        try:
            options_of(command)
        except click.UsageError as error:
            pytest.fail(f"{document.name}: {shlex.join(command)}: {error.format_message()}")
    verbs = {command[1] for _, command in found if command[0] == "bilora-ray"}
    assert verbs == set(COMMANDS), "each verb is somewhere in the documentation"
    assert len(found) >= 75


def test_no_command_is_overlooked() -> None:
    """The reader of commands finds as many as a plain search of the shells' blocks does."""
    for document in documents():
        text = document.read_text(encoding="utf-8")
        plain = len(re.findall(r"^ *(?:\S+ \| )?bilora-ray [a-z]", "\n".join(blocks(text, "bash")), re.M))
        assert len([command for command in commands_in(text) if command[0] == "bilora-ray"]) >= plain


def test_the_commands_that_need_nothing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = 0
    for _, command in _commands():
        shows = command[1] == "settings" and command[2:] != ["WORD"]
        if shows or (command[1] == "validate" and command[2] in ("chat", "quickstart", "llama")):
            done = CliRunner().invoke(main, command[1:])
            assert done.exit_code == 0, (command, done.output)
            run += 1
    assert run >= 5


@EACH
def test_blocks_are_of_a_language_that_is_checked(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"^ *```(\w+)$", text, re.M)) <= {"bash", "yaml", "python", "text"}


# Space files


def _merged(base: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return {key: {**base.get(key, {}), **(part.get(key) or {})} for key in {**base, **part}}


def _spaces() -> Iterator[tuple[Path, dict[str, Any]]]:
    for document in documents():
        for block in blocks(document.read_text(encoding="utf-8"), "yaml"):
            yield document, yaml.safe_load(block)


def test_every_space_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    found = list(_spaces())
    for number, (document, part) in enumerate(found):
        if "comparison" in part:
            checked_comparison(sections_of(part, document), document, (), locate=lambda name, *_: name)
            continue
        assert part.keys() <= {"study", "trial", "resources"}, document
        whole = {"study", "trial"} <= part.keys()
        file = tmp_path / f"{document.stem}-{number}.yaml"
        file.write_text(yaml.safe_dump(part if whole else _merged(BASE, part)), encoding="utf-8")
        load_space(file, locate=lambda name, *_: name)
    assert len(found) >= 9


def test_a_whole_file_on_the_model_that_ships_begins_as_it_stands() -> None:
    found = 0
    for document, part in _spaces():
        if part.get("trial", {}).get("model_name_or_path") != "builtin:quickstart/model":
            continue
        if "comparison" in part:
            comparison = checked_comparison(sections_of(part, document), document, ())
            space = comparison.spaces[comparison.baseline]
        elif "study" in part:
            space = checked_space(part, document, ())
        else:
            continue
        preflight(space, dry_run=True)
        found += 1
    assert found >= 2


# Python


@cache
def _public(module: str) -> frozenset[str]:
    return frozenset(importlib.import_module(module).__all__)


@EACH
def test_python_uses_public_names_only(document: Path) -> None:
    for block in blocks(document.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bilora_ray"):
                assert node.module in ("bilora_ray", "bilora_ray.method")
                assert {name.name for name in node.names} <= _public(node.module)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "bilora_ray":
                    assert node.attr in bilora_ray.__all__
                if node.value.id == "study":
                    assert not node.attr.startswith("_")
                    assert node.attr in {*dir(bilora_ray.Study), "metric", "greater_is_better", "name"}


def test_there_is_python_to_check() -> None:
    assert sum(len(blocks(path.read_text(encoding="utf-8"), "python")) for path in documents()) >= 4


# Errors


def test_every_error_of_troubleshooting_is_one_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    errors = re.findall(r"^### `(.+)`$", text, re.M)
    said = set(_texts())
    for error in errors:
        parts = [part.strip() for part in error.split("...") if part.strip()]
        assert sum(map(len, parts)) > 12, f"{error}: says too little to be found"
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        assert any(pattern.search(one) for one in said), f"{error}: the code has no such line"
    assert len(errors) >= 20


def _texts() -> Iterator[str]:
    """The texts of the code, with a gap where a value is filled in."""
    for file in (ROOT / "bilora_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(one.value) if isinstance(one, ast.Constant) else "\0" for one in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


# The tutorial


def _typed_in_the_tutorial() -> list[str]:
    return blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), "bash")


def _type(block: str, folder: Path) -> str:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block],
        cwd=folder,
        env={**os.environ, "PATH": programs},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (block, done.stderr)
    return done.stdout


def test_the_tutorial_begins_as_it_says(tmp_path: Path) -> None:
    rows, drafting, checking = _typed_in_the_tutorial()[:3]
    _type(rows, tmp_path)
    assert "init" in drafting
    _type(f"{drafting.strip()} --model builtin:quickstart/model", tmp_path)
    assert "is valid: study 'mine'" in _type(checking, tmp_path)


@pytest.mark.slow
def test_the_tutorial_runs_from_end_to_end(tmp_path: Path) -> None:
    for block in _typed_in_the_tutorial():
        _type(block, tmp_path)
    assert (tmp_path / "runs" / "studies" / "mine" / "report.html").is_file()
    assert (tmp_path / "answers.jsonl").is_file()
