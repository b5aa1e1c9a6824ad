"""What is allowed and yet seldom meant: a person hears of it as a search starts, which goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.training.tasks.rows import Dataset, LabelledRow, Row

# Short texts come again in many a data set; a larger share is a mistake.
MOST_SHARED = 0.5


def notes(dataset: Dataset, config: TrialConfig, workers: int) -> Iterator[str]:
    """Lines about the rows and the settings of a trial, each of which begins with a setting.

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
