"""Resources that ship inside the package, found by name without a network."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_RESOURCES = {
    "quickstart": "quickstart",
    "quickstart/model": "quickstart/model",
    "quickstart/train": "quickstart/train.jsonl",
    "quickstart/validation": "quickstart/validation.jsonl",
    "quickstart/test": "quickstart/test.jsonl",
}


def names() -> list[str]:
    """Return the names that ``path`` knows."""
    return sorted(_RESOURCES)


def path(name: str) -> Path:
    """Return the absolute path of the built-in resource called ``name``.

    ``quickstart`` is the folder that holds the others. Raises ValueError for a name that does not exist.
    """
    if name not in _RESOURCES:
        raise ValueError(f"no built-in resource is called {name!r}; there are: {', '.join(names())}")
    return _FOLDER / _RESOURCES[name]
