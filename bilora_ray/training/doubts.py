"""What is allowed and yet seldom meant: told to a person before a search, which goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.training.rows import Dataset, LabelledRow, Row


def doubts(dataset: Dataset, config: TrialConfig, workers: int) -> Iterator[str]:
    """Lines about the rows and the settings of a trial, each of which names a setting.

    Args:
        dataset: the rows.
        config: the settings.
        workers: how many train the trial together.
    """
    digests = dataset.digests
    if digests["train_data"] == digests.get("validation_data") and not config.validation_split:
        yield "validation_data: holds the rows of train_data, so that no metric shows what generalises"
    is_text = config.task != "sequence-classification" and config.messages_column is None
    if is_text and not template_columns(config.completion_template):
        yield "completion_template: names no column, so that every row has the same completion"
    for setting, rows in (("train_data", dataset.train), ("validation_data", dataset.validation)):
        if empty := _empty(rows):
            yield f"{setting}: {empty} of {len(rows)} completions are empty"
    step = workers * config.per_device_train_batch_size * config.gradient_accumulation_steps
    if step > len(dataset.train):
        yield f"per_device_train_batch_size: a step would take {step} rows, and there are {len(dataset.train)}"


def _empty(rows: Sequence[Row]) -> int:
    return sum(not isinstance(row, LabelledRow) and not row.completion.strip() for row in rows)
