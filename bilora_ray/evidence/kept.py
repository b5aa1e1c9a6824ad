"""The files that keep what a comparison found, beside its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER, TEXT, PICTURE = "comparison", "comparison.json", "comparison.png"


@dataclass(frozen=True)
class Kept:
    """What was kept of a comparison.

    Attributes:
        sentences: what it says, a line an entry.
        notes: what there is to know before that is believed.
        picture: a PNG of it; None where none could be drawn.
    """

    sentences: Sequence[str]
    notes: Sequence[str]
    picture: bytes | None


def kept_in(folder: Path) -> Kept | None:
    """What is kept in the folder of a study of runs; None before they are scored."""
    try:
        told = json.loads((folder / FOLDER / TEXT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    picture = folder / FOLDER / PICTURE
    return Kept(told["sentences"], told["notes"], picture.read_bytes() if picture.is_file() else None)
