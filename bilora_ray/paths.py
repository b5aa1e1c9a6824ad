"""Where a model or data file is: local, built in, or on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilora_ray.errors import UserError

BUILTIN = "builtin:"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SOURCES = ("model_name_or_path", "train_data", "validation_data")


def absolute_sources(settings: Mapping[str, Any], base: Path, where: str) -> dict[str, Any]:
    """`settings` with every local path among the SOURCES made absolute, starting at `base`.

    A trial runs in a folder of its own and a cluster's node in another package folder, so local paths become
    absolute here, once, while Hub names and `builtin:` names stay as they are. A choice of sources is treated value
    by value.

    Raises:
        UserError: a text that is neither an existing path nor can be a Hub name, or a path that cannot be looked at.
    """
    result = dict(settings)
    for key in SOURCES:
        value = result.get(key)
        if isinstance(value, str):
            result[key] = _absolute(value, base, f"{where}.{key}", is_data=key != "model_name_or_path")
        elif isinstance(value, dict) and isinstance(value.get("choice"), list):
            choice = [absolute_sources({key: v}, base, where)[key] for v in value["choice"]]
            result[key] = {**value, "choice": choice}
    return result


def _absolute(name: str, base: Path, where: str, is_data: bool) -> str:
    if not name or name.startswith(BUILTIN):
        return name
    try:
        path = Path(base, Path(name).expanduser())
        if path.exists():
            return str(path.resolve())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where}: {name}: {getattr(error, 'strerror', None) or error}") from None
    looks_local = name.startswith((".", "/", "~")) or (is_data and name.endswith(DATA_SUFFIXES))
    if looks_local or not HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: no such {'file' if is_data else 'folder'}: {path}")
    return name
