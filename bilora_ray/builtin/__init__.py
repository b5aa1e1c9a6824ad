"""Resources that ship inside the package, found by name without a network."""

from __future__ import annotations

from pathlib import Path

from bilora_ray.errors import UserError, nearest

_FOLDER = Path(__file__).resolve().parent
NAMES = (
    "quickstart/model",
    "quickstart/train.jsonl",
    "quickstart/validation.jsonl",
    "quickstart/test.jsonl",
    "quickstart/chats.jsonl",
)


def path(name: str) -> Path:
    """The absolute path of the built-in resource `name`, one of NAMES. UserError if there is none of that name."""
    if name not in NAMES:
        raise UserError(f"no built-in '{name}'; {nearest(name, NAMES)}")
    return _FOLDER / name
