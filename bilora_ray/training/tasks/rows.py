"""Rows to learn from: read, checked, labelled and split, before any tokenizer is loaded.

A wrong row is found here, in seconds and by its file and line, and not by a worker later. Nothing imports torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.training.data.chat import messages_of
from bilora_ray.training.data.columns import filled, label_of, label_text_of, listed, text_of
from bilora_ray.training.data.order import shuffled
from bilora_ray.training.data.sources import Record, read_train, read_validation
from bilora_ray.training.metrics import NO_LABEL, answer, label_index

INTEGER = re.compile(r"-?\d+")
# Short texts come again in many a data set; a larger share is a mistake.
MOST_SHARED = 0.5


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
        pair = None if config.text_pair_column is None else text_of(record, config.text_pair_column)
        return LabelledRow(text_of(record, config.text_column), pair, label_of(record, config, names), record.where)
    if config.messages_column is not None:
        return ChatRow(messages_of(record, config.messages_column), record.where)
    templates = (config.prompt_template, config.completion_template)
    values = {column: text_of(record, column) for template in templates for column in template_columns(template)}
    if names is not None and config.label_column in values:
        values[config.label_column] = names[label_of(record, config, names)]
    prompt, completion = (filled(template, values) for template in templates)
    return TextRow(prompt, completion, record.where)


def _label_names(records: Iterable[Record], config: TrialConfig) -> tuple[str, ...] | None:
    if config.label_names is not None or config.task != "sequence-classification":
        return config.label_names
    found = {label_text_of(record, config.label_column) for record in records}
    if len(found) < 2:
        raise UserError(f"train_data: every label in {config.train_data} is '{found.pop()}'; two or more are needed")
    if all(INTEGER.fullmatch(name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _check_references(rows: Iterable[Row], config: TrialConfig) -> None:
    """Each validation completion must have an answer, or no model could be right about it."""
    for row in rows:
        assert not isinstance(row, LabelledRow)
        if config.label_names is None:
            if answer(row.completion, config.answer_pattern) is None:
                raise UserError(f"{row.where}: answer_pattern matches nothing in the completion")
        elif label_index(row.completion, config.label_names, config.answer_pattern) == NO_LABEL:
            labels = listed(config.label_names)
            raise UserError(f"{row.where}: the completion's answer is not among the labels ({labels})")


def notes(dataset: Dataset, config: TrialConfig, workers: int) -> Iterator[str]:
    """What is allowed in a trial and yet seldom meant: lines that begin with a setting, told as a search starts.

    Args:
        dataset: the rows.
        config: the settings.
        workers: how many train the trial together.
    """
    named = [key for key in ("validation_data", "validation_split") if getattr(config, key) is not None]
    validation_data = (*named, "train_data")[0]
    contents = Counter(map(_content, dataset.validation))
    shared = sum(contents[content] for content in {_content(row) for row in dataset.train if _content(row) in contents})
    if shared > MOST_SHARED * len(dataset.validation):
        yield (
            f"{validation_data}: {shared} of {len(dataset.validation)} validation rows are training rows too, "
            "which no metric of generalisation should see"
        )
    is_text = config.task != "sequence-classification" and config.messages_column is None
    if is_text and not template_columns(config.completion_template):
        yield "completion_template: names no column, so that every row has the same completion"
    for setting, kind, rows in (
        ("train_data", "training", dataset.train),
        (validation_data, "validation", dataset.validation),
    ):
        if empty := _empty(rows):
            yield f"{setting}: {empty} of {len(rows)} {kind} rows have an empty completion"
    step = config.step_rows(workers)
    if step > len(dataset.train):
        yield f"per_device_train_batch_size: a step would take {step} rows, and there are {len(dataset.train)}"
    if config.max_steps is not None and "num_train_epochs" in config.model_fields_set:
        yield f"num_train_epochs: changes nothing beside max_steps ({config.max_steps})"


def _content(row: Row) -> str:
    return repr(replace(row, where=""))


def _empty(rows: Sequence[Row]) -> int:
    return sum(not isinstance(row, LabelledRow) and not row.completion.strip() for row in rows)
