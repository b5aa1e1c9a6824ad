"""What one record's columns hold: texts, labels, templates. Each problem is told by the record's place.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
import re
import string
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.sources import Record

# Columns that nobody named -> the setting that names another.
DEFAULTS = {
    str(field.default).strip("{}"): key
    for key, field in TrialConfig.model_fields.items()
    if key.endswith(("_column", "_template")) and field.default is not None
}
# What seldom is the name of a column, and often a text or a number.
NO_NAME = re.compile(r"-?\d|.*[^\w .#()%/?:-]|.{50}", re.DOTALL)


def value_of(record: Record, column: str) -> Any:
    """The value of `column`. UserError if there is none, with the nearest column's name."""
    if column not in record.columns:
        close = difflib.get_close_matches(column, record.columns, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        listing = f"columns: {', '.join(record.columns) or 'none'}"
        if any(map(NO_NAME.match, record.columns)):
            listing += "; if the file has no header, column_names names them"
        setting = f" ({DEFAULTS[column]})" if column in DEFAULTS else ""
        raise UserError(f"{record.where}: no column '{column}'{setting}; {hint}{listing}")
    value = record.columns[column]
    if _is_missing(value):
        raise UserError(f"{record.where}: column '{column}' has no value")
    return value


def _is_missing(value: Any) -> bool:
    """Whether a value is none: pandas writes a missing one as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(record: Record, column: str) -> str:
    """A text, a number or a date as text. UserError if it is none of them.

    A missing value is an empty text, whichever kind of file it is in: CSV has no other way to write either.
    """
    if _is_missing(record.columns.get(column, "")):
        return ""
    value = value_of(record, column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float | Decimal | date | time):
        check_characters(str(value), f"{record.where}: column '{column}'")
        return str(value)
    raise UserError(f"{record.where}: column '{column}' must be text or a number, not {type(value).__name__}")


def check_characters(text: str, where: str) -> None:
    """UserError for half of a surrogate pair: JSON can escape one, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate)") from None


def label_text_of(record: Record, column: str) -> str:
    """A label as text. A whole float is an integer that passed through a table with gaps. UserError if it is empty."""
    value = value_of(record, column)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if value == "":
        raise UserError(f"{record.where}: column '{column}' has no value")
    return text_of(record, column)


def label_of(record: Record, config: TrialConfig, names: tuple[str, ...]) -> int:
    """Index of the record's label: by its name or, where `label_names` is given, by its index; a name comes first.

    Raises:
        UserError: it is not among `names`.
    """
    name = label_text_of(record, config.label_column)
    if name in names:
        return names.index(name)
    value = record.columns[config.label_column]
    index = str(int(value)) if isinstance(value, bool) else name
    if config.label_names is not None and re.fullmatch(r"\d{1,9}", index) and int(index) < len(names):
        return int(index)
    raise UserError(f"{record.where}: label '{name}' is not among the labels ({listed(names)})")


def filled(template: str, values: Mapping[str, str]) -> str:
    """`template` with its columns. str.format would take a column called 0 for a position."""
    parts = string.Formatter().parse(template)
    return "".join(text + ("" if column is None else values[column]) for text, column, _, _ in parts)


def listed(names: Sequence[str]) -> str:
    """All of `names`, or the first ten where a line would not hold them."""
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])}, ... {len(names)} in all"
