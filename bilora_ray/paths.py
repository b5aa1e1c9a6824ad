"""Where a model or data file is, local, built in, or on the Hub: who wants to know asks here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bilora_ray import builtin
from bilora_ray.errors import UserError

BUILTIN = "builtin:"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = "model.safetensors"
# Files of a model that transformers asks for and that a repository need not have; the cache remembers which it has not.
OPTIONAL = ("tokenizer_config.json", "chat_template.jinja", "adapter_config.json")
Kind = Literal["built in", "local", "hub"]
# A source's name, the folder that relative paths start at, where the name is written, whether it is data -> the source.
Locate = Callable[[str, Path, str, bool], str]


def kind_by_name(name: str, is_data: bool) -> Kind:
    """Where the `name` of a source says that it is, whatever is on this machine."""
    if name.startswith(BUILTIN):
        return "built in"
    looks_local = name.startswith((".", "/", "~")) or (is_data and name.endswith(DATA_SUFFIXES))
    return "local" if looks_local else "hub"


def kind_of(name: str, is_data: bool) -> Kind:
    """Where a source is: what exists under a path that could be a Hub name goes before it."""
    kind, path = kind_by_name(name, is_data), Path(name)
    return "local" if kind == "hub" and (path.exists() if is_data else path.is_dir()) else kind


def loadable(name: str) -> str:
    """What a library takes for `name`: of what is built in the path, else `name`. UserError if no such is built in."""
    return str(builtin.path(name.removeprefix(BUILTIN))) if name.startswith(BUILTIN) else name


def locate_here(name: str, base: Path, where: str, is_data: bool) -> str:
    """The absolute path of a local source, the name of one elsewhere. UserError if it can be neither."""
    if not name:
        return name
    kind = kind_by_name(name, is_data)
    if kind == "built in":
        _check_builtin(name, where, is_data)
        return name
    try:
        path = Path(base, Path(name).expanduser())
        if is_data and path.is_dir():
            raise UserError(f"{where}: {path} is a folder; a file is needed ({', '.join(DATA_SUFFIXES)})")
        if not is_data and path.is_file():
            raise UserError(f"{where}: {path} is a file; a model is a folder")
        if path.exists():
            return str(path.resolve())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where}: {name}: {getattr(error, 'strerror', None) or error}") from None
    if kind == "local" or not HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: no such {'file' if is_data else 'folder'}: {path}")
    return name


def _check_builtin(name: str, where: str, is_data: bool) -> None:
    try:
        found = Path(loadable(name))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if found.is_dir() is is_data:
        raise UserError(f"{where}: '{name}' is {'a model' if is_data else 'data'}")


@dataclass(frozen=True)
class LocalSource:
    """A file or folder that a space names by a relative path.

    Attributes:
        where: it is named, such as `my_space.yaml: trial.train_data`.
        name: as it is written.
        path: absolute; symbolic links are left in it.
    """

    where: str
    name: str
    path: Path


class SourcesElsewhere:
    """Locates the sources of a space that another machine will read, and notes which of them are files of this one.

    Relative paths are this machine's. Absolute ones, and those that start at a home folder, are the other one's.

    Attributes:
        local: the relative paths.
    """

    def __init__(self) -> None:
        self.local: list[LocalSource] = []

    def __call__(self, name: str, base: Path, where: str, is_data: bool) -> str:
        """As `locate_here`, but an absolute path need not exist."""
        if name.startswith(("/", "~")) or not Path(locate_here(name, base, where, is_data)).is_absolute():
            return name
        source = LocalSource(where, name, Path(os.path.abspath(base / name)))
        self.local.append(source)
        return str(source.path)


def is_cached(model: str, revision: str | None, *optional: str) -> bool:
    """Whether the Hub's cache on this machine has a model's commit whole: its settings, tokenizer and weights.

    A branch or tag may have moved since, so of one this is not known.

    Args:
        model: its name.
        revision: the commit.
        optional: files besides OPTIONAL that are asked for and that it need not have.
    """
    from huggingface_hub import try_to_load_from_cache

    if not COMMIT.fullmatch(revision or "") or kind_of(model, is_data=False) != "hub" or not HUB_NAME.fullmatch(model):
        return False

    def found(file: str) -> Any:
        return try_to_load_from_cache(model, file, revision=revision)

    weights = {WEIGHTS}
    if isinstance(index := found(f"{WEIGHTS}.index.json"), str):
        weights = set(json.loads(Path(index).read_text())["weight_map"].values())
    known = all(found(file) is not None for file in (*OPTIONAL, *optional))
    return known and all(isinstance(found(file), str) for file in ("config.json", *weights))


def cached_commit(model: str, revision: str | None) -> str | None:
    """The commit that the Hub's cache on this machine holds for a `revision`; None if `model` is local or not there."""
    from huggingface_hub import try_to_load_from_cache

    if kind_of(model, is_data=False) != "hub":
        return None
    file = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None
