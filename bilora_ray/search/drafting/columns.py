"""What the columns of rows seem to hold, by the first of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import PurePath
from typing import Any

from bilora_ray.errors import UserError
from bilora_ray.paths import IMAGE_SUFFIXES
from bilora_ray.search.drafting.firsts import Kind
from bilora_ray.training.data.columns import is_missing, label_text
from bilora_ray.training.data.labels import MANY, look_like_numbers
from bilora_ray.training.data.sources import BEGINNING, Record

IDS = frozenset({"id", "uuid", "guid", "idx", "date", "timestamp", "url", "created", "updated"})
DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}")
WORDS = re.compile(r"[A-Za-z][a-z]*|[0-9]+")
# What is longer than this in characters, or has more different values than a third of the rows, is no label.
LONGEST_LABEL = 60
# Of so many rows a label has to be; below that every text is different.
FEW = 3


@dataclass(frozen=True)
class Column:
    """A column, by its first rows.

    Attributes:
        name: as the data have it.
        kind: of its values.
        same: the value that all rows have, if they have one.
    """

    name: str
    kind: Kind
    same: str | None = field(default=None, compare=False)

    @property
    def words(self) -> set[str]:
        """Those of its name, in lower case."""
        return {self.name.lower(), *(word.lower() for word in WORDS.findall(self.name))}


def look_at(records: Sequence[Record]) -> list[Column]:
    """The columns of `records`, in their order, by the first of these."""
    first = list(islice(records, BEGINNING))
    names = dict.fromkeys(name for record in first for name in record.columns)
    values = {name: [record.columns.get(name) for record in first] for name in names}
    return [Column(name, _kind(name, found), _same(found)) for name, found in values.items()]


def _same(values: Sequence[Any]) -> str | None:
    """The value of a text or a number that all of several rows have."""
    first = values[0]
    if len(values) < FEW or not isinstance(first, str | int | float) or first == "":
        return None
    return str(first) if all(type(value) is type(first) and value == first for value in values) else None


def _kind(name: str, values: Sequence[Any]) -> Kind:
    found = [value for value in values if not is_missing(value) and value != ""]
    if not found or any(isinstance(value, dict) and not _is_image(value) for value in found):
        return "other"
    if all(map(_is_image, found)):
        return "image"
    if any(isinstance(value, list | tuple) for value in found):
        return "list"
    try:
        texts = [label_text(value, name) for value in found]
    except UserError:  # dates, times
        return "other"
    different = list(dict.fromkeys(texts))
    if Column(name, "other").words & IDS or all(map(DATE.match, different)):
        return "other"
    if _numeric(different):
        if look_like_numbers(different, len(texts)):
            return "other" if _counts_rows(texts) else "number"
        return "label" if len(different) <= max(MANY, len(texts) // FEW) else "number"
    comes_again = 2 <= len(different) <= max(2, len(texts) // FEW) and len(different) < len(texts)
    return "label" if comes_again and max(map(len, different)) <= LONGEST_LABEL else "text"


def _is_image(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() <= {"bytes", "path"} and bool(value)
    return isinstance(value, bytes) or (
        isinstance(value, str) and len(value) < 1000 and PurePath(value).suffix.lower() in IMAGE_SUFFIXES
    )


def _numeric(texts: Sequence[str]) -> bool:
    try:
        return all(float(text) is not None for text in texts)
    except ValueError:
        return False


def _counts_rows(texts: Sequence[str]) -> bool:
    """Whether numbers go up by one from row to row."""
    numbers = [float(text) for text in texts]
    return len(numbers) > 1 and all(after - before == 1 for before, after in pairwise(numbers))
