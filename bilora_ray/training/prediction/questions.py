"""What an adapter is asked: rows of data, or a prompt that was typed. Their answers need not be there.

A question becomes what the model reads by the code of training and evaluation: only what is learned of a row is left
out of it. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS
from bilora_ray.training.data.columns import check_characters, filled
from bilora_ray.training.data.files.images import beside
from bilora_ray.training.data.formats import in_format
from bilora_ray.training.data.sources import Record, read_train
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Row
from bilora_ray.training.tasks.text import most_new_tokens

TYPED = "the prompt"


def asking(config: TrialConfig, max_new_tokens: int | None = None) -> TrialConfig:
    """The settings of an evaluation as those of asking: every row gets an answer, and none is judged.

    A prompt keeps the tokens that it has in an evaluation, however long the text behind it may be.

    Args:
        config: of the evaluation.
        max_new_tokens: of a text; None: as in the evaluation.

    Raises:
        UserError: the task writes no text, and its length is asked for.
    """
    task, facts = TASKS[config.task], TASK_FACTS[config.task]
    changed: dict[str, Any] = {"answer_pattern": None, "check_labels": False, "truncation": "both"}
    if facts.generates:
        before = most_new_tokens(config, task.continues)
        changed |= {"predict_with_generate": True, "max_new_tokens": max_new_tokens or before}
        if task.continues:
            changed["max_length"] = config.max_length - before + changed["max_new_tokens"]
    elif max_new_tokens is not None:
        raise UserError(f"--max-new-tokens: {config.task} writes no text")
    return config.model_copy(update=changed)


def records_of(config: TrialConfig) -> tuple[Collection[Record], TrialConfig]:
    """The rows that `config` names as its training data, and `config` with their format, if it was not known.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    records = read_train(config).records
    return records, in_format(config, records)


def record_of(prompt: str, config: TrialConfig) -> Record:
    """A row of a prompt that was typed.

    It is the user's message where chats were learned, the words where they are tagged, and else the one column that a
    question has; where it has several, the prompt is a JSON object of them. An image is named by its path.

    Raises:
        UserError: there is nothing in it, or it does not say what each column is.
    """
    if not prompt.strip():
        raise UserError(f"{TYPED} is empty; there is nothing to ask")
    check_characters(prompt, TYPED)
    if config.chat_column is not None:
        return Record({config.chat_column: [{"role": "user", "content": prompt}]}, TYPED)
    columns = columns_of(config)
    if len(columns) == 1:
        value = TASKS[config.task].of_prompt(prompt)
        return Record({columns[0]: beside(Path.cwd(), value) if columns[0] == config.image_column else value}, TYPED)
    given: Any = None
    with suppress(ValueError):
        given = json.loads(prompt)
    if not isinstance(given, dict) or not set(columns) <= given.keys():
        example = json.dumps(dict.fromkeys(columns, "..."))
        raise UserError(f"{TYPED}: a question has the columns {', '.join(columns)}; give all as JSON: '{example}'")
    return Record({column: given[column] for column in columns}, TYPED)


def columns_of(config: TrialConfig) -> tuple[str, ...]:
    """The columns that a question has, where it is no chat."""
    if TASK_FACTS[config.task].reads_images:
        return (config.image_column,)
    if not TASK_FACTS[config.task].generates:
        return tuple(filter(None, (config.text_column, config.text_pair_column)))
    if config.format == "alpaca":
        return ("instruction",)
    return tuple(dict.fromkeys(template_columns(config.prompt_template)))


def question(record: Record, config: TrialConfig) -> Row:
    """What is asked by `record`.

    Raises:
        UserError: a column is missing, or there is nothing in those that are read.
    """
    row: Any = TASKS[config.task].asked(record, config)
    bare = filled(config.prompt_template, dict.fromkeys(template_columns(config.prompt_template), ""))
    for text, nothing in ((getattr(row, "text", None), ""), (getattr(row, "prompt", None), bare)):
        if text is not None and text.strip() == nothing.strip() and columns_of(config):
            raise UserError(f"{record.where}: is empty; there is nothing to ask")
    if getattr(row, "words", True) == ():
        raise UserError(f"{record.where}: has no words; there is nothing to ask")
    return row


def chunks(records: Collection[Record], config: TrialConfig, size: int) -> Iterator[tuple[list[Record], list[Row]]]:
    """`records` and their questions, so many at one time."""
    some: list[Record] = []
    for record in records:
        some.append(record)
        if len(some) == size:
            yield some, [question(one, config) for one in some]
            some = []
    if some:
        yield some, [question(one, config) for one in some]
