"""What the package uses of other libraries beyond their promises is there, is listed, and holds them to a version."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from private_names import HELD, NAMES, OBJECTS, PARAMETERS, WORDS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "bilora_ray").rglob("*.py"))


def listed(table: Mapping[str, tuple[Any, ...]]) -> list[tuple[Any, str]]:
    return [(name, use) for use, names in table.items() for name in names]


@cache
def _object(name: str) -> Any:
    return OBJECTS[name]()


def exists(name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    try:
        return hasattr(pkgutil.resolve_name(owner), attribute) or (
            owner in OBJECTS and hasattr(_object(owner), attribute)
        )
    except (ImportError, AttributeError):
        return False


def reads(module: str, word: str) -> bool:
    try:
        return re.search(rf"\b{word}", inspect.getsource(importlib.import_module(module))) is not None
    except ImportError:
        return False


def takes(function: str, parameter: str) -> bool:
    try:
        found = pkgutil.resolve_name(function)
        return parameter in inspect.signature(found).parameters
    except ValueError:  # compiled: its signature is the text of its documentation
        return re.search(rf"\b{parameter}\b", found.__init__.__doc__ or "") is not None
    except (ImportError, AttributeError):
        return False


def moved(name: str, use: str) -> str:
    """The line that says what is to be mended."""
    library = name.split(".")[0]
    return f"{library} {importlib.metadata.version(library)} has no {name}: used by {use}"


@pytest.mark.parametrize(("name", "use"), listed(NAMES))
def test_the_name_is_there(name: str, use: str) -> None:
    assert exists(name), moved(name, use)


@pytest.mark.parametrize(("name", "use"), listed(WORDS))
def test_the_word_is_read(name: tuple[str, str], use: str) -> None:
    assert reads(*name), moved(" that reads ".join(name), use)


@pytest.mark.parametrize(("name", "use"), listed(PARAMETERS))
def test_the_parameter_is_taken(name: tuple[str, str], use: str) -> None:
    assert takes(*name), moved(" with a parameter ".join(name), use)


# What the package uses


@dataclass
class Class:
    """What a class of the package says of itself.

    Attributes:
        bases: their names, without modules.
        own: methods, and what is assigned in its body or to `self`.
    """

    bases: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.startswith("__")


def classes(sources: Iterable[str]) -> dict[str, Class]:
    found: dict[str, Class] = {}
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if not isinstance(node, ast.ClassDef):
            continue
        known = found.setdefault(node.name, Class())
        known.bases |= {ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases}
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                known.own.add(inner.name)
            elif isinstance(inner, ast.Name | ast.Attribute) and isinstance(inner.ctx, ast.Store):
                known.own.add(inner.id if isinstance(inner, ast.Name) else inner.attr)
    return found


def private_names(source: str, known: Mapping[str, Class]) -> Iterator[tuple[int, str]]:
    """Line and name of each name of another library that begins with an underscore, or that is reached through one.

    Args:
        source: the text of a module.
        known: the classes of the package: what they call their own is nobody else's.
    """
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for full, alias in _imported(node):
                if any(map(is_private, full.split("."))):
                    aliases[alias] = full
                    yield node.lineno, full
    for owner, node in _with_class(tree):
        if isinstance(node, ast.keyword) and is_private(node.arg):
            yield node.value.lineno, str(node.arg)
        elif isinstance(node, ast.Call) and _text_of_name(node):
            yield node.lineno, _text_of_name(node)
        elif isinstance(node, ast.Attribute):
            value = ast.unparse(node.value)
            if value in aliases:
                yield node.lineno, f"{aliases[value]}.{node.attr}"
            elif is_private(node.attr) and not _is_ours(value, node.attr, owner, known):
                yield node.lineno, node.attr


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Full name and alias of what a statement imports from other libraries."""
    for name in node.names:
        full = f"{node.module}.{name.name}" if isinstance(node, ast.ImportFrom) else name.name
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if not relative and full.split(".")[0] not in ("bilora_ray", "__future__"):
            yield full, name.asname or name.name


def _with_class(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Each node with the name of the class that it stands in."""
    for node in ast.iter_child_nodes(tree):
        yield owner, node
        yield from _with_class(node, node.name if isinstance(node, ast.ClassDef) else owner)


def _text_of_name(call: ast.Call) -> str:
    """The private name that a call of `getattr` and its kind has as a text."""
    if ast.unparse(call.func) not in ("getattr", "setattr", "hasattr", "delattr") or len(call.args) < 2:
        return ""
    name = call.args[1]
    text = name.value if isinstance(name, ast.Constant) else None
    return str(text) if isinstance(text, str) and is_private(text) else ""


def _is_ours(value: str, name: str, owner: str, known: Mapping[str, Class]) -> bool:
    if value in sys.stdlib_module_names:
        return True
    if value in ("self", "cls"):
        return _owns(owner, name, known)
    return value == "super()" and any(_owns(base, name, known) for base in known[owner].bases)


def _owns(owner: str, name: str, known: Mapping[str, Class]) -> bool:
    if owner not in known:
        return False
    return name in known[owner].own or any(_owns(base, name, known) for base in known[owner].bases - {owner})


def unlisted(name: str) -> bool:
    """Whether none of NAMES is this one, or is reached through it; what is reached through one of them is listed."""
    if "." not in name:
        return not any(known.rpartition(".")[2] == name for known, _ in listed(NAMES))
    return not any(
        f"{known}.".startswith(f"{name}.") or f"{name}.".startswith(f"{known}.") for known, _ in listed(NAMES)
    )


def test_every_private_name_that_the_package_uses_is_listed() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    known = classes(texts.values())
    assert [
        f"{path.relative_to(ROOT)}, line {line}: {name} is not in NAMES"
        for path, text in texts.items()
        for line, name in private_names(text, known)
        if unlisted(name)
    ] == []


def test_nothing_is_listed_that_the_package_does_not_use() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    names = [name.rpartition(".")[2] for name, _ in listed(NAMES)]
    words = [word for (_, word), _ in listed(WORDS) + listed(PARAMETERS) if word != "trial_id"]  # given by position
    assert [name for name in names + words if not re.search(rf"\b{name}", text)] == []


def test_the_libraries_that_are_held_are_so_to_their_tested_minor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    tested = {name: Version(version) for name, version in pins}
    dotted = [name for name, _ in listed(NAMES)] + [name for (name, _), _ in listed(WORDS) + listed(PARAMETERS)]
    assert set(HELD) <= {name.split(".")[0] for name in dotted}
    for library in HELD:
        major, minor = tested[library].major, tested[library].minor
        assert sorted(map(str, required[library])) == [f"<{major}.{minor + 1}", f">={major}.{minor}"], library


# The checks themselves: each finds what it is for.

OURS = classes(["class Ours(Base):\n    def _own(self): self._kept = 1\nclass Base:\n    def _base(self): ...\n"])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from ray._private import state", "ray._private.state"),
        ("from ray.train.torch.config import _Other", "ray.train.torch.config._Other"),
        ("import optuna.storages._rdb.models", "optuna.storages._rdb.models"),
        ("study._directions", "_directions"),
        ("self._study._storage2", "_storage2"),
        ("self._of_another_library()", "_of_another_library"),
        ("super()._own()", "_own"),
        ("ray._private2.x", "_private2"),
        ("ray.init(_temp_dir='/')", "_temp_dir"),
        ("getattr(model, '_tp_plan', None)", "_tp_plan"),
        ("torch._foreach_div_(group)", "_foreach_div_"),
    ],
)
def test_a_private_name_that_is_new_is_found(line: str, name: str) -> None:
    source = f"class Ours(Base):\n    def f(self):\n        self._kept, self._study = 1, 2\n        {line}\n"
    known = {**OURS, "Ours": Class(OURS["Ours"].bases, OURS["Ours"].own | {"_study"})}
    assert list(private_names(source, known)) == [(4, name)]
    assert unlisted(name)


@pytest.mark.parametrize(
    "line",
    [
        "self._own()",
        "self._base()",
        "super()._base()",
        "cls._kept",
        "os._exit(2)",
        "from bilora_ray.search.study import _mine",
        "from . import _mine",
        "model.__class__",
        "getattr(error, 'strerror', None)",
    ],
)
def test_a_name_of_ours_is_let_through(line: str) -> None:
    source = f"class Ours(Base):\n    def f(self):\n        {line}\n"
    assert list(private_names(source, OURS)) == []


def test_what_is_reached_through_a_private_name_is_found() -> None:
    source = "from ray._private import ray_constants as rc\nrc.ENABLE_RAY_CLUSTER\nrc.OTHER\n"
    found = [name for _, name in private_names(source, {}) if unlisted(name)]
    assert found == ["ray._private.ray_constants.OTHER"]


def test_what_has_moved_is_said_in_one_line() -> None:
    assert not exists("optuna.study.Study._no_such")
    assert not exists("optuna._no_such.name")
    assert not reads("ray.tune.tune", "TUNE_NO_SUCH")
    assert not takes("torch.distributed.TCPStore", "no_such")
    assert not takes("optuna.trial.Trial", "no_such")
    version = importlib.metadata.version("optuna")
    assert (
        moved("optuna.study.Study._x", "the study")
        == f"optuna {version} has no optuna.study.Study._x: used by the study"
    )
