"""What a trial learns from, ready to be batched, and kept for the next trial of the process.

Tokenizing takes some tenths of a millisecond a row, a minute of a large data set, and the trials of a search mostly
differ in what does not touch it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig, deciding
from bilora_ray.training.model import load_tokenizer
from bilora_ray.training.tasks.prepare import Prepared, prepare
from bilora_ray.training.tasks.rows import load_rows

# All settings but these decide the examples, or could.
NOT_OF_EXAMPLES = deciding("training", "memory")
WITHOUT_EFFECT = {key: TrialConfig.model_fields[key].default for key in NOT_OF_EXAMPLES}

# What tells a file from the same one after it was written again.
Stamp = tuple[int, int]
_kept: dict[tuple[TrialConfig, Stamp | None, Stamp | None], Loaded] = {}


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


def _stamp(name: str | None) -> Stamp | None:
    path = Path(name or "").expanduser()
    if name is None or not path.is_file():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size
