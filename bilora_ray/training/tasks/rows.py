"""Rows to learn from: read, checked, labelled and split, before any tokenizer is loaded.

A wrong row is found here, in seconds and by its file and line, and not by a worker later. Nothing imports torch.
"""

from __future__ import annotations

import difflib
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.training.data.order import shuffled
from bilora_ray.training.data.sources import Record, read_train, read_validation
from bilora_ray.training.metrics import NO_LABEL, answer, label_index

INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class TextRow:
    """A prompt and its completion, templates filled; `where` is the row's place for errors."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation that ends with the assistant's turn and does not start with it."""

    messages: Sequence[Mapping[str, Any]]
    where: str

    @property
    def completion(self) -> str:
        """The assistant's last turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text, or a pair of texts, and the index of its label."""

    text: str
    text_pair: str | None
    label: int
    where: str


Row = TextRow | ChatRow | LabelledRow


@dataclass(frozen=True)
class Dataset:
    """All the rows of one trial.

    Attributes:
        train: rows to train on, in the order of their source.
        validation: rows to evaluate on, in the order of their source.
        label_names: names by label index; None where the task has no labels.
        digests: what identifies the content, by setting (`train_data`, `validation_data`); the latter is absent
            when validation rows are split off the training data. See `sources.Source`.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    label_names: tuple[str, ...] | None
    digests: Mapping[str, str]


def load_rows(config: TrialConfig) -> Dataset:
    """Read and check every row, split off validation rows if none are named, and draw the samples asked for.

    Labels are those of all the training data, whatever is drawn of it, so that a label has the same index in
    every trial. The split and the draw depend on `config.resolved_split_seed` and the number of rows alone, and a
    smaller draw is part of a larger one.

    Raises:
        UserError: data that is missing or malformed, or that does not fit the settings.
    """
    if config.messages_column is not None and config.task != "causal-lm":
        raise UserError(f"messages_column: only causal-lm takes chat messages, not {config.task}")
    source, validation_source = read_train(config), read_validation(config)
    names = _label_names(source.records, config)
    train = [_row(record, config, names) for record in source.records]
    digests = {"train_data": source.digest}
    if validation_source is None:
        train, validation = _hold_out(train, config)
    else:
        validation = [_row(record, config, names) for record in validation_source.records]
        digests["validation_data"] = validation_source.digest
    validation = validation[: config.max_eval_samples]
    if config.predict_with_generate:
        _check_references(validation, config)
    return Dataset(_draw(train, config), validation, names, digests)


def _hold_out(rows: Sequence[Row], config: TrialConfig) -> tuple[list[Row], list[Row]]:
    if len(rows) < 2:
        raise UserError(f"validation_data: missing, and {config.train_data} has too few rows to split (1)")
    count = min(max(round(len(rows) * config.validation_fraction), 1), len(rows) - 1)
    order = shuffled(len(rows), "validation", config.resolved_split_seed)
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def _draw(rows: list[Row], config: TrialConfig) -> list[Row]:
    if config.max_train_samples is None:
        return rows
    drawn = shuffled(len(rows), "sample", config.resolved_split_seed)[: config.max_train_samples]
    return [rows[i] for i in sorted(drawn)]


def _row(record: Record, config: TrialConfig, names: tuple[str, ...] | None) -> Row:
    if config.task == "sequence-classification":
        assert names is not None
        pair = None if config.text_pair_column is None else _text(record, config.text_pair_column)
        return LabelledRow(_text(record, config.text_column), pair, _label(record, config, names), record.where)
    if config.messages_column is not None:
        return ChatRow(_messages(record, config.messages_column), record.where)
    templates = (config.prompt_template, config.completion_template)
    values = {column: _text(record, column) for template in templates for column in template_columns(template)}
    if names is not None and config.label_column in values:
        values[config.label_column] = names[_label(record, config, names)]
    prompt, completion = (_filled(template, values) for template in templates)
    return TextRow(prompt, completion, record.where)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """`template` with its columns. str.format would take a column called 0 for a position."""
    parts = string.Formatter().parse(template)
    return "".join(text + ("" if column is None else values[column]) for text, column, _, _ in parts)


def _value(record: Record, column: str) -> Any:
    if column not in record.columns:
        close = difflib.get_close_matches(column, record.columns, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise UserError(f"{record.where}: no column '{column}'; {hint}columns: {', '.join(record.columns) or 'none'}")
    value = record.columns[column]
    # pandas writes a missing value as NaN.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{record.where}: column '{column}' has no value")
    return value


def _text(record: Record, column: str) -> str:
    value = _value(record, column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        _check_characters(str(value), f"{record.where}: column '{column}'")
        return str(value)
    raise UserError(f"{record.where}: column '{column}' must be text or a number, not {type(value).__name__}")


def _check_characters(text: str, where: str) -> None:
    """JSON can escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate)") from None


def _label_names(records: Iterable[Record], config: TrialConfig) -> tuple[str, ...] | None:
    if config.label_names is not None or config.task != "sequence-classification":
        return config.label_names
    found = {_label_text(record, config.label_column) for record in records}
    if len(found) < 2:
        raise UserError(f"train_data: every label in {config.train_data} is '{found.pop()}'; two or more are needed")
    if all(INTEGER.fullmatch(name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _label(record: Record, config: TrialConfig, names: tuple[str, ...]) -> int:
    """Index of the record's label: by its name or, where `label_names` is given, by its index; a name comes first."""
    name = _label_text(record, config.label_column)
    if name in names:
        return names.index(name)
    value = record.columns[config.label_column]
    index = str(int(value)) if isinstance(value, bool) else name
    if config.label_names is not None and re.fullmatch(r"\d{1,9}", index) and int(index) < len(names):
        return int(index)
    raise UserError(f"{record.where}: label '{name}' is not among the labels ({_listed(names)})")


def _label_text(record: Record, column: str) -> str:
    """A label as text. A whole float is an integer that passed through a table with gaps."""
    value = _value(record, column)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if value == "":
        raise UserError(f"{record.where}: column '{column}' has no value")
    return _text(record, column)


def _messages(record: Record, column: str) -> list[Mapping[str, Any]]:
    """The conversation up to the assistant's last turn: nothing after it is learned or read."""
    messages = _value(record, column)
    if not isinstance(messages, list):
        raise UserError(f"{record.where}: column '{column}' must be a list of messages, not {type(messages).__name__}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{record.where}: message {number} must have a role and a content, both text")
        _check_characters(message["content"], f"{record.where}: message {number}")
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise UserError(f"{record.where}: no message has the role 'assistant'")
    if spoken[0] == 0:
        raise UserError(f"{record.where}: the first message is the assistant's; there is nothing it answers")
    return messages[: spoken[-1] + 1]


def _check_references(rows: Iterable[Row], config: TrialConfig) -> None:
    """Each validation completion must have an answer, or no model could be right about it."""
    for row in rows:
        assert not isinstance(row, LabelledRow)
        if config.label_names is None:
            if answer(row.completion, config.answer_pattern) is None:
                raise UserError(f"{row.where}: answer_pattern matches nothing in the completion")
        elif label_index(row.completion, config.label_names, config.answer_pattern) == NO_LABEL:
            labels = _listed(config.label_names)
            raise UserError(f"{row.where}: the completion's answer is not among the labels ({labels})")


def _listed(names: Sequence[str]) -> str:
    """All of `names`, or the first ten where a line would not hold them."""
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])}, ... {len(names)} in all"
