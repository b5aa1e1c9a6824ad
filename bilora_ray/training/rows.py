"""Rows to learn from: read, checked, labelled and split, before any tokenizer is loaded.

A wrong row is found here, in seconds and by its file and line, and not by a worker later. Nothing imports torch.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress, islice
from typing import Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.paths import kind_of
from bilora_ray.training.data import sources
from bilora_ray.training.data.columns import WrongLabels, filled, text_of
from bilora_ray.training.data.formats import format_note, in_format
from bilora_ray.training.data.labels import Labelled, RowLabels, labels_of_rows
from bilora_ray.training.data.order import held_out, stratified
from bilora_ray.training.data.sources import (
    BEGINNING,
    Record,
    Reread,
    Source,
    check_validation,
    first_records,
    read_train,
    read_validation,
)
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset, Labels, Row, no_labels

# So many rows show what is wrong with what a space file says of its data.
FIRST_ROWS = 20
# Short texts come again in many a data set; a larger share is a mistake.
MOST_SHARED = 0.5
# Turns marks over.
OTHERS = bytes([1, 0, *range(2, 256)])


def load_rows(config: TrialConfig, beginning: bool = False) -> Dataset:
    """Read and check every row, split off validation rows if none are named, and draw the samples asked for.

    Args:
        config: the settings.
        beginning: look at the first `sources.BEGINNING` rows of a large source only.

    Raises:
        UserError: data that is missing or malformed, or that does not fit the settings.
    """
    return rows_of(read_sources(config, beginning), config)


def read_sources(config: TrialConfig, beginning: bool = False) -> dict[str, Source]:
    """The sources of the training rows and, where they are named, of the validation rows, by setting.

    Raises:
        UserError: as `load_rows`, but for what only the rows of a large source could show.
    """
    _check_task(config)
    found = {"train_data": read_train(config, beginning), "validation_data": read_validation(config, beginning)}
    return {key: source.beginning() if beginning else source for key, source in found.items() if source is not None}


def rows_of(sources: Mapping[str, Source], config: TrialConfig) -> Dataset:
    """The rows of `sources`, each checked once, in a pass that also counts a large source's rows and their labels.

    Labels are those of all the training data, whatever is drawn of it, so that a label has the same index in
    every trial. The split and the draws depend on `config.resolved_split_seed`, the number of rows and, if they are to
    `stratify`, their labels alone, and a smaller draw is part of a larger one.

    Raises:
        UserError: as `load_rows`.
    """
    config = _in_format(config, {key: source.records for key, source in sources.items()})
    names = _label_names(sources, config)
    train, *named = (_rows(source.records, config, names) for source in sources.values())
    train, validation = (train, named[0]) if named else _hold_out(train, config)
    if config.stratify:
        validation = _draw(validation, config.max_eval_samples, "evaluation", config)
    elif config.max_eval_samples is not None:  # as it was before rows were drawn by their labels
        validation = _chosen(validation, range(min(config.max_eval_samples, len(validation))))
    TASKS[config.task].check(validation, config)
    digests = {key: source.digest for key, source in sources.items()}
    partial = {key: source.size for key, source in sources.items() if source.everything is not None}
    drawn = _draw(train, config.max_train_samples, "sample", config)
    return Dataset(drawn, validation, None if names is None else tuple(names), digests, partial, config.format)


def check_first_rows(config: TrialConfig) -> None:
    """As `load_rows`, of the first rows of files of this machine: a wrong suffix or column shows in them.

    Labels that only later rows have are no mistake here, and the Hub is not asked.

    Raises:
        UserError: what `load_rows` would say too.
    """
    task = TASKS[config.task]
    _check_task(config)
    check_validation(config)
    found = first_records(config, FIRST_ROWS)
    if any(len(records) == FIRST_ROWS for records in found.values()):
        # What -1, 0 or false means is told by all labels.
        config = config.model_copy(update={"check_labels": False})
    config = _in_format(config, found)
    train = found.get("train_data", [])
    is_whole = config.label_names is None and 0 < len(train) < FIRST_ROWS
    for setting, records in found.items():
        names = _first_labels(train if is_whole else records, config, is_whole)
        rows = [task.row(record, config, names) for record in records]
        is_drawn = config.stratify and config.max_eval_samples is not None
        if setting == "validation_data" and not is_drawn:
            task.check(rows[: config.max_eval_samples], config)
        elif config.validation_data is None and config.validation_split is None and len(rows) == 1:
            _hold_out(rows, config)


def _first_labels(records: Sequence[Record], config: TrialConfig, is_whole: bool) -> Labels:
    """The labels of `records`: fewer than all, unless `is_whole`: these are all rows to train on."""
    try:
        return TASKS[config.task].label_names(records, config)
    except WrongLabels as error:  # the first rows of a sorted file have one label
        if is_whole:
            raise
        return error.names


def _in_format(config: TrialConfig, records: Mapping[str, Collection[Record]]) -> TrialConfig:
    """`config` with the format of the training records, which are not there where only the Hub has them."""
    if "train_data" in records:
        config = in_format(config, *records.values())
        _check_task(config)
    return config


def _check_task(config: TrialConfig) -> None:
    if config.chat_column is not None and not TASKS[config.task].takes_messages:
        allowed = ", ".join(name for name, other in TASKS.items() if other.takes_messages)
        setting = "format" if config.messages_column is None else "messages_column"
        raise UserError(f"{setting}: only {allowed} takes chat messages, not {config.task}")


def _label_names(sources: Mapping[str, Source], config: TrialConfig) -> Labels:
    find, train = TASKS[config.task].label_names, sources["train_data"]
    if config.label_names is not None:
        return find(chain.from_iterable(source.records for source in sources.values()), config)
    if train.everything is None:
        return find(train.records, config)
    try:  # what is not among the first rows to train on may be among the others
        return find([record for source in sources.values() for record in source.records], config)
    except UserError:  # those of a file that is sorted by label have one
        return find(train.everything, config)


def _rows(records: Collection[Record], config: TrialConfig, names: Labels) -> Collection[Row]:
    row, labels = TASKS[config.task].row, TASKS[config.task].labels

    def read() -> Iterator[Row]:
        return (row(record, config, names) for record in records)

    if isinstance(records, list):
        return list(read())
    if labels is no_labels:
        return Reread(read, sum(1 for _ in read()))
    return Labelled(read, RowLabels.of(map(labels, read())))


def _hold_out(rows: Collection[Row], config: TrialConfig) -> tuple[Collection[Row], Collection[Row]]:
    if len(rows) < 2:
        raise UserError(f"validation_data: missing, and {config.train_data} has too few rows to split (1)")
    count = min(max(round(len(rows) * config.validation_fraction), 1), len(rows) - 1)
    held = held_out(_groups(rows, config), count, "validation", config.resolved_split_seed)
    is_held = _marked(held, len(rows))
    return _compressed(rows, is_held.translate(OTHERS), len(rows) - count), _compressed(rows, is_held, count)


def _draw(rows: Collection[Row], most: int | None, what: str, config: TrialConfig) -> Collection[Row]:
    if most is None:
        return rows
    return _chosen(rows, stratified(_groups(rows, config), what, config.resolved_split_seed)[:most])


def _chosen(rows: Collection[Row], indices: Sequence[int]) -> Collection[Row]:
    """The rows with these `indices`, in their own order. Of a large source a byte for each row is kept, or five."""
    return _compressed(rows, _marked(indices, len(rows)), len(indices))


def _marked(indices: Iterable[int], count: int) -> bytearray:
    marked = bytearray(count)
    for index in indices:
        marked[index] = True
    return marked


def _compressed(rows: Collection[Row], is_chosen: bytearray, count: int) -> Collection[Row]:
    if isinstance(rows, list):
        return list(compress(rows, is_chosen))

    def read() -> Iterator[Row]:
        return compress(rows, is_chosen)

    return Labelled(read, rows.labels.chosen(is_chosen)) if isinstance(rows, Labelled) else Reread(read, count)


def _groups(rows: Collection[Row], config: TrialConfig) -> Sequence[int]:
    """The label of each row by which it is drawn: of several the rarest, of none -1."""
    labels = TASKS[config.task].labels if config.stratify else no_labels
    if labels is no_labels:
        return array("i", [-1]) * len(rows)  # without a pass over them
    return labels_of_rows(rows, labels).rarest()


def notes(dataset: Dataset, config: TrialConfig, workers: int) -> Iterator[str]:
    """What is allowed in a trial and yet seldom meant: lines that begin with a setting, told as a search starts.

    What they say of the rows of a large source is of the first ones, and a line says that.

    Args:
        dataset: the rows.
        config: the settings.
        workers: how many train the trial together.
    """
    yield from sources.notes(config, bool(dataset.partial))
    yield from format_note(config, dataset.format)
    config = config.model_copy(update={"format": dataset.format})
    named = [key for key in ("validation_data", "validation_split") if getattr(config, key) is not None]
    validation_data = (*named, "train_data")[0]
    rows, others, dataset = len(dataset.train), len(dataset.validation), _beginning(dataset)
    for setting, size in dataset.partial.items():
        yield f"{setting}: only the first {BEGINNING} rows were looked at, of {size / 1e9:.1f} GB; a search reads all"
    if len(dataset.train) < rows or len(dataset.validation) < others:
        checked = f"each of the {rows} training and {others} validation rows was checked"
        yield f"train_data: {checked}; what is noted of them is of the first {BEGINNING} of each"
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
    for key in ("f1_average", "positive_label"):
        if getattr(config, key) is not None and "eval_f1" not in config.available_metrics:
            yield f"{key}: changes nothing, for eval_f1 is not measured here"
    step = config.step_rows(workers)
    if step > rows:
        yield f"per_device_train_batch_size: a step would take {step} rows, and there are {rows}"
    if config.max_steps is not None and "num_train_epochs" in config.model_fields_set:
        yield f"num_train_epochs: changes nothing beside max_steps ({config.max_steps})"


def shared_with(test: Dataset, rows: Dataset) -> Iterator[str]:
    """A line where test rows were trained or judged on: their score would say nothing of others.

    Args:
        test: whose validation rows are the test rows.
        rows: of the trials.
    """
    seen = {_content(row) for row in chain(_first(rows.train), _first(rows.validation))}
    tested = _first(test.validation)
    if shared := sum(_content(row) in seen for row in tested):
        yield f"test_data: {shared} of {len(tested)} test rows are training or validation rows too"


def read_retained(config: TrialConfig) -> tuple[list[str], str]:
    """The texts of `retention_data`, less the empty ones, and the digest of their file.

    Raises:
        UserError: it is no file of texts, or the task's models go on with none.
    """
    name = str(config.retention_data)
    if not TASKS[config.task].continues:
        allowed = ", ".join(word for word, task in TASKS.items() if task.continues)
        raise UserError(f"retention_data: {config.task} goes on with no text; allowed with {allowed}")
    if kind_of(name, is_data=True) == "hub":
        raise UserError(f"retention_data: {name} is no file here; texts of the Hub are written to one first")
    source = sources.read_file(name, config, "retention_data")
    texts = [text_of(record, config.text_column) for record in source.records]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"retention_data: {name} has no text in column '{config.text_column}' (text_column)")
    return texts, source.digest


def _empty_notes(rows: Collection[Any], config: TrialConfig, counted: str) -> Iterator[str]:
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


def _beginning(dataset: Dataset) -> Dataset:
    return replace(dataset, train=_first(dataset.train), validation=_first(dataset.validation))


def _first(rows: Collection[Row]) -> list[Row]:
    """The first rows of a large source; all of one that is not."""
    return rows if isinstance(rows, list) else list(islice(rows, BEGINNING))


def _content(row: Any) -> str:
    return repr(replace(row, where=""))
