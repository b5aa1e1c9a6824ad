"""What a trial learns from, ready to be batched, and kept for the next trial of the process.

Tokenizing takes some tenths of a millisecond a row, a minute of a large data set, and the trials of a search mostly
differ in what does not touch it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig, deciding
from bilora_ray.errors import UserError
from bilora_ray.training.model import load_tokenizer
from bilora_ray.training.rows import load_rows
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Cut, Dataset, Example, Row
from bilora_ray.training.tasks.truncation import Truncation

# All settings but these decide the examples, or could.
NOT_OF_EXAMPLES = deciding("training", "memory")
WITHOUT_EFFECT = {key: TrialConfig.model_fields[key].default for key in NOT_OF_EXAMPLES}

# Rows tokenized at one time: enough to be fast, few enough that Python's int lists stay small.
CHUNK = 1000

# What tells a file from the same one after it was written again.
Stamp = tuple[int, int]
_kept: dict[tuple[TrialConfig, Stamp | None, Stamp | None], Loaded] = {}


@dataclass(frozen=True)
class Prepared:
    """The examples of a trial, and what truncation did, by split: `train` and `validation`."""

    train: Sequence[Example]
    validation: Sequence[Example]
    truncation: dict[str, Truncation]


@dataclass(frozen=True)
class Loaded(Prepared):
    """The examples of a trial, with what made them.

    Attributes:
        tokenizer: the base model's.
        label_names: names by label index; None where the task has no labels.
    """

    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...] | None


def load_data(config: TrialConfig) -> Loaded:
    """Read, check and tokenize the rows; or what was loaded last, if it would be the same.

    Raises:
        UserError: the data or the tokenizer are not as the settings say.
    """
    # Of the two seeds one decides them.
    decisive = config.model_copy(update={**WITHOUT_EFFECT, "seed": 0, "split_seed": config.resolved_split_seed})
    key = (decisive, _stamp(config.train_data), _stamp(config.validation_data))
    if key not in _kept:
        _kept.clear()  # before there is another: they may be large
        _kept[key] = _load(decisive)
    return _kept[key]


def _load(config: TrialConfig) -> Loaded:
    rows = load_rows(config)
    tokenizer = load_tokenizer(config)
    prepared = prepare(rows, config, tokenizer)
    return Loaded(**vars(prepared), tokenizer=tokenizer, label_names=rows.label_names)


def prepare(dataset: Dataset, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Tokenize all rows; the task's file says what happens to those longer than `max_length`.

    Validation examples keep their prompts, from which a text can be generated.

    Raises:
        UserError: the tokenizer lacks what the task needs, or a row or a split has nothing to predict.
    """
    train, train_truncation = _encoded(dataset.train, config, tokenizer, "train")
    validation, validation_truncation = _encoded(dataset.validation, config, tokenizer, "validation")
    return Prepared(train, validation, {"train": train_truncation, "validation": validation_truncation})


def _encoded(
    rows: Sequence[Row], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, split: str
) -> tuple[list[Example], Truncation]:
    task, keep_prompts = TASKS[config.task], split == "validation"
    examples: list[Example] = []
    cuts: list[Cut] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row, encoded in zip(chunk, task.examples(chunk, config, tokenizer, keep_prompts), strict=True):
            for example, _ in encoded:
                _check_readable(example, row, config, keep_prompts)
            kept = [(example, taken) for example, taken in encoded if task.target_count([example])]
            examples += [example for example, _ in kept]
            if kept:
                cuts.append(reduce(or_, [taken for _, taken in kept]))
    if not examples:
        too_long = f"has max_length ({config.max_length}) tokens or less, and" if config.truncation == "drop" else "has"
        raise UserError(f"{split}_data: no row {too_long} a token to predict")
    return examples, _counted(len(rows), cuts)


def _counted(rows: int, cuts: Sequence[Cut]) -> Truncation:
    """What was taken from so many `rows`, by that of each row that is left."""
    kinds = Counter(kind for cut in cuts for kind in cut)
    return Truncation(
        rows=rows,
        cut=sum(map(bool, cuts)),
        dropped=rows - len(cuts),
        prompt_gone=kinds[Cut.WHOLE_PROMPT],
        prompt_cut=kinds[Cut.PROMPT],
        completion_cut=kinds[Cut.COMPLETION],
    )


def _check_readable(example: Example, row: Row, config: TrialConfig, keep_prompts: bool) -> None:
    if not example.input_ids or (config.predict_with_generate and keep_prompts and not example.prompt_ids):
        raise UserError(f"{row.where}: there is no text to read")


def _stamp(name: str | None) -> Stamp | None:
    path = Path(name or "").expanduser()
    if name is None or not path.is_file():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size
