"""What one record's columns hold: texts, labels, templates. Each problem is told by the record's place.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import string
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
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
INTEGER = re.compile(r"-?\d+")
# An integer as a table with gaps has it.
WHOLE = re.compile(r"-?\d+\.0+")
TRUTHS = frozenset({"true", "false"})
# So many names are listed in a line.
MOST_NAMES = 10


class WrongLabels(UserError):
    """What is wrong with the labels of all rows, and need not be with those of some; `names` are those there are."""

    def __init__(self, line: str, names: Iterable[str] = ()) -> None:
        super().__init__(line)
        self.names = tuple(names)


class ByIndex(tuple[str, ...]):
    """The names of labels that rows give by their indices, though some of these are names too."""


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
    if is_missing(value):
        raise UserError(f"{record.where}: column '{column}' has no value")
    return value


def is_missing(value: Any) -> bool:
    """Whether a value is none: pandas writes a missing one as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(record: Record, column: str) -> str:
    """A text, a number or a date as text. UserError if it is none of them.

    A missing value is an empty text, whichever kind of file it is in: CSV has no other way to write either.
    """
    if is_missing(record.columns.get(column, "")):
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
    """The label in `column` as text. UserError if it has none."""
    return label_text(value_of(record, column), f"{record.where}: column '{column}'")


def label_text(value: Any, where: str) -> str:
    """A label as text: a text as it is written, and of numbers 1, 1.0 and Decimal("1.00") as "1".

    A whole float is an integer that passed through a table with gaps. UserError that begins with `where` if the value
    is empty, or neither a text nor a number.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal):
        number = float(value)
        value = int(number) if number.is_integer() else "" if math.isnan(number) else number
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} must be text or a number, not {type(value).__name__}")
    text = str(value)
    check_characters(text, where)
    if not text.strip():
        raise UserError(f"{where} has no value")
    return text


def labels_of(record: Record, column: str, delimiter: str) -> list[str]:
    """The labels in `column` as text: those of a list, or of a text that has the `delimiter` between them.

    A text in brackets is a list as JSON has it. A row may have no labels: an empty list, an empty text.

    Raises:
        UserError: they are none of this, or one stands twice.
    """
    value, where = value_of(record, column), f"{record.where}: column '{column}'"
    if isinstance(value, str) and value.strip().startswith("["):
        value = _json_list(value, where)
    elif isinstance(value, str):
        value = [part.strip() for part in value.split(delimiter) if part.strip()]
    found = [label_text(item, where) for item in (value if isinstance(value, list | tuple) else [value])]
    for text, count in Counter(found).items():
        if count > 1:
            line = f"label '{text}' stands {count} times"
            raise UserError(f"{where}: {line}; it holds the names of a row's labels, not 0 or 1 for each")
    return found


def _json_list(text: str, where: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError:
        raise UserError(f'{where}: begins as a list, and is none as JSON has it, such as ["a", "b"]') from None
    assert isinstance(found, list)
    return found


def number_of(record: Record, column: str) -> float:
    """The label in `column` as a number. UserError if it is none, or not finite, or float32 cannot hold it."""
    value = value_of(record, column)
    number = math.nan
    if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) and "_" not in str(value):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{record.where}: column '{column}' must be a finite number, not {value!r}")
    if not math.isfinite(array("f", [number])[0]):
        raise UserError(f"{record.where}: column '{column}': {value!r} is more than float32 can hold; scale the labels")
    return number


def label_of(record: Record, config: TrialConfig, names: tuple[str, ...]) -> int:
    """Index of the record's label. UserError if it is not among `names`."""
    value = value_of(record, config.label_column)
    text = label_text(value, f"{record.where}: column '{config.label_column}'")
    return index_of(text, config, names, record.where, isinstance(value, bool))


def index_of(text: str, config: TrialConfig, names: tuple[str, ...], where: str, is_bool: bool = False) -> int:
    """Index of a label: by its name or, where `label_names` is given, by its index; a name comes first.

    Raises:
        UserError: it is not among `names`; the line begins with `where`.
    """
    known = {} if isinstance(names, ByIndex) else _indices(names)
    for name in (text, plain(text)):
        if name in known:
            return known[name]
    index = str(int(text == "true")) if is_bool else plain(text)
    if config.label_names is not None and _is_index(index, names):
        return int(index)
    hint = "; -1 stands for no label" if plain(text) == "-1" else ""
    raise UserError(f"{where}: label '{text}' is not among the labels ({listed(names)}){hint}")


def _is_index(text: str, names: Sequence[str]) -> bool:
    return bool(re.fullmatch(r"\d{1,9}", plain(text))) and int(plain(text)) < len(names)


@lru_cache(maxsize=4)
def _indices(names: tuple[str, ...]) -> dict[str, int]:
    """The index of each name as it is and, where no other is so, as another kind of file has it."""
    alike = {plain(name): index for index, name in reversed(list(enumerate(names)))}
    return alike | {name: index for index, name in enumerate(names)}


def plain(name: str) -> str:
    """A label as JSON has it, in which those of several kinds of files meet: pandas writes True for true, 1.0 for 1."""
    if name.lower() in TRUTHS:
        return name.lower()
    return str(int(name.partition(".")[0])) if WHOLE.fullmatch(name) else name


def names_of(found: Iterable[tuple[str, str]], config: TrialConfig) -> tuple[str, ...]:
    """The names of the labels in the order of their indices: those of the settings, or those that were found.

    Args:
        found: each row's labels with its place, which are looked at only if they have to be.
        config: the settings.

    Raises:
        WrongLabels: there are fewer than two, or `eval_f1` is of none of them.
        UserError: one of them stands for no label; the rows mix the names and the indices of those that the settings
            name.
    """
    if config.label_names is not None:
        return _given(found, config.label_names)
    labels = _first_places(found)
    if not labels:
        raise WrongLabels(f"train_data: {config.train_data} has no label; two or more are needed")
    if len(labels) < 2:
        every = f"every label in {config.train_data} is '{min(labels)}'"
        raise WrongLabels(f"train_data: {every}; two or more are needed", labels)
    whole = all(INTEGER.fullmatch(name) for name in labels)
    names = tuple(sorted(labels, key=lambda name: (int(name), name) if whole else name))
    if config.check_labels:
        _check_unlabelled(labels)
    try:
        config.check_f1(names)
    except ValueError as error:
        raise WrongLabels(str(error), names) from None
    return names


def _first_places(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for label, where in found:
        labels.setdefault(label, where)
    return labels


def _given(found: Iterable[tuple[str, str]], names: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, by index if all labels are indices and not all are names: one way for all rows.

    Only where the index of one is the name of another can it be told wrongly, and are the rows looked at.

    Raises:
        UserError: some labels are names and no indices, others are indices and no names.
    """
    if all(not _is_index(name, names) or int(plain(name)) == index for index, name in enumerate(names)):
        return names
    labels, known = _first_places(found), _indices(names)
    unnamed = [label for label in labels if not {label, plain(label)} & known.keys() and _is_index(label, names)]
    if not unnamed or len(unnamed) == len(labels):
        return names
    named = [label for label in labels if label not in unnamed and not _is_index(label, names)]
    if not named:
        return ByIndex(names)
    line = (
        f"label '{unnamed[0]}' is an index of label_names and no name, and '{named[0]}' of {labels[named[0]]} is none"
    )
    raise UserError(f"{labels[unnamed[0]]}: {line}; all rows give names, or all indices")


def _check_unlabelled(labels: Mapping[str, str]) -> None:
    """UserError if one of three labels or more is -1, and the others are whole numbers from 0 on.

    Of two labels it is a class, beside 1 as a rule: with no label there would be but one.
    """
    numbers = sorted(labels, key=lambda name: int(plain(name)) if INTEGER.fullmatch(plain(name)) else -2)
    if len(numbers) > 2 and plain(numbers[0]) == "-1":
        example = json.dumps(numbers) if len(numbers) <= MOST_NAMES else f'["{numbers[0]}", "{numbers[1]}", ...]'
        means = "beside labels from 0 on stands for a row without a label"
        line = f"{labels[numbers[0]]}: label '{numbers[0]}' {means}"
        raise UserError(f"{line}: leave it out, or set label_names: {example}")


def filled(template: str, values: Mapping[str, str]) -> str:
    """`template` with its columns. str.format would take a column called 0 for a position."""
    parts = string.Formatter().parse(template)
    return "".join(text + ("" if column is None else values[column]) for text, column, _, _ in parts)


def listed(names: Sequence[str]) -> str:
    """All of `names`, or the first ten where a line would not hold them."""
    most = MOST_NAMES
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])}, ... {len(names)} in all"
