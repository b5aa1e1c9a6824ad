"""Rows to learn from: read, checked, labelled and split, before any tokenizer is loaded.

A wrong row is found here, in seconds and by its file and line, and not by a worker later. Nothing imports torch.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.training.data import sources
from bilora_ray.training.data.columns import filled
from bilora_ray.training.data.order import held_out, stratified
from bilora_ray.training.data.sources import read_train, read_validation
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset, Row, no_labels

# Short texts come again in many a data set; a larger share is a mistake.
MOST_SHARED = 0.5


def load_rows(config: TrialConfig) -> Dataset:
    """Read and check every row, split off validation rows if none are named, and draw the samples asked for.

    Labels are those of all the training data, whatever is drawn of it, so that a label has the same index in
    every trial. The split and the draws depend on `config.resolved_split_seed`, the number of rows and, if they are to
    `stratify`, their labels alone, and a smaller draw is part of a larger one.

    Raises:
        UserError: data that is missing or malformed, or that does not fit the settings.
    """
    task = TASKS[config.task]
    if config.messages_column is not None and not task.takes_messages:
        allowed = ", ".join(name for name, other in TASKS.items() if other.takes_messages)
        raise UserError(f"messages_column: only {allowed} takes chat messages, not {config.task}")
    source, validation_source = read_train(config), read_validation(config)
    names = task.label_names(source.records, config)
    train = [task.row(record, config, names) for record in source.records]
    digests = {"train_data": source.digest}
    if validation_source is None:
        train, validation = _hold_out(train, config)
    else:
        validation = [task.row(record, config, names) for record in validation_source.records]
        digests["validation_data"] = validation_source.digest
    # As it was before rows were drawn by their labels, the first ones are taken.
    drawn = validation[: config.max_eval_samples]
    if config.stratify:
        drawn = _draw(validation, config.max_eval_samples, "evaluation", config)
    task.check(drawn, config)
    return Dataset(_draw(train, config.max_train_samples, "sample", config), drawn, names, digests)


def _hold_out(rows: Sequence[Row], config: TrialConfig) -> tuple[list[Row], list[Row]]:
    if len(rows) < 2:
        raise UserError(f"validation_data: missing, and {config.train_data} has too few rows to split (1)")
    count = min(max(round(len(rows) * config.validation_fraction), 1), len(rows) - 1)
    held = set(held_out(_groups(rows, config), count, "validation", config.resolved_split_seed))
    kept = (i for i in range(len(rows)) if i not in held)
    return [rows[i] for i in kept], [rows[i] for i in sorted(held)]


def _draw(rows: list[Row], most: int | None, what: str, config: TrialConfig) -> list[Row]:
    if most is None:
        return rows
    drawn = stratified(_groups(rows, config), what, config.resolved_split_seed)[:most]
    return [rows[i] for i in sorted(drawn)]


def _groups(rows: Sequence[Row], config: TrialConfig) -> Sequence[int]:
    """A number for the labels of each row, by which rows are drawn; without labels they are all of one group."""
    labels = TASKS[config.task].labels if config.stratify else no_labels
    numbers: dict[Hashable, int] = {}
    return array("i", (numbers.setdefault(labels(row), len(numbers)) for row in rows))


def notes(dataset: Dataset, config: TrialConfig, workers: int) -> Iterator[str]:
    """What is allowed in a trial and yet seldom meant: lines that begin with a setting, told as a search starts.

    Args:
        dataset: the rows.
        config: the settings.
        workers: how many train the trial together.
    """
    yield from sources.notes(config)
    named = [key for key in ("validation_data", "validation_split") if getattr(config, key) is not None]
    validation_data = (*named, "train_data")[0]
    yield from _empty_notes(dataset.train, config, "train_data: {} of {} training")
    yield from _empty_notes(dataset.validation, config, f"{validation_data}: {{}} of {{}} validation")
    contents = Counter(map(_content, dataset.validation))
    shared = sum(contents[content] for content in {_content(row) for row in dataset.train if _content(row) in contents})
    if shared > MOST_SHARED * len(dataset.validation):
        yield (
            f"{validation_data}: {shared} of {len(dataset.validation)} validation rows are training rows too, "
            "which no metric of generalisation should see"
        )
    yield from TASKS[config.task].notes(dataset, config, validation_data)
    step = config.step_rows(workers)
    if step > len(dataset.train):
        yield f"per_device_train_batch_size: a step would take {step} rows, and there are {len(dataset.train)}"
    if config.max_steps is not None and "num_train_epochs" in config.model_fields_set:
        yield f"num_train_epochs: changes nothing beside max_steps ({config.max_steps})"


def _empty_notes(rows: Sequence[Any], config: TrialConfig, counted: str) -> Iterator[str]:
    """Lines about rows of which there is nothing to read, with the place of the first. A completion has its own."""
    bare = filled(config.prompt_template, dict.fromkeys(template_columns(config.prompt_template), ""))
    for what, nothing in (("text", ""), ("text_pair", ""), ("prompt", bare)):
        texts = ((row.where, getattr(row, what, None)) for row in rows)
        empty = [where for where, text in texts if text is not None and text.strip() == nothing.strip()]
        if empty and (what != "prompt" or template_columns(config.prompt_template)):
            words = what.replace("_", " ")
            yield f"{counted.format(len(empty), len(rows))} rows have an empty {words}, the first is {empty[0]}"


def about(dataset: Dataset, config: TrialConfig) -> list[str]:
    """What is to be known of the labels before anything is learned: lines for people."""
    return list(TASKS[config.task].about(dataset, config))


def _content(row: Any) -> str:
    return repr(replace(row, where=""))
