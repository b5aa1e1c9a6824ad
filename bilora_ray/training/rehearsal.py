"""A trial without its weights and its steps: most of what it would refuse shows in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.loading import load_data, prepare
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset
from bilora_ray.training.tasks.truncation import Truncation

# So many rows show what a chat template does, in a moment.
FIRST = 100


@dataclass(frozen=True)
class Rehearsal:
    """What a trial would begin with.

    Attributes:
        rows: how many there are and what `max_length` takes from them, by split: `train` and `validation`.
        input: text of the first training row, as the model reads it, with special tokens.
        target: the part of it, or the completion or label, that the model learns.
        notes: lines about what is allowed and yet seldom meant, and shows in tokens only.
    """

    rows: Mapping[str, Truncation]
    input: str
    target: str
    notes: tuple[str, ...]


def rehearse(config: TrialConfig, here: bool = True) -> Rehearsal:
    """Tokenize the data, of large ones the beginning, and put the method's adapters on the base model's shape.

    Args:
        config: the settings.
        here: whether trials run on this machine, so that its packages and GPUs are theirs.

    Raises:
        UserError: the data, the tokenizer, the model, `max_length` or a target module is not as the settings say, or a
            package that they need is missing.
    """
    data = load_data(config, beginning=True)
    model = models.add_primary(models.load_shape(config, data.label_names, here), config, fresh=())
    models.build_optimizer(model, config)
    first = data.train[0]
    target = TASKS[config.task].learned(first, data.tokenizer, data.label_names)
    notes = (*data.notes, *Truncation.of(data.truncation.values()).notes(config.model_dump()))
    return Rehearsal(data.truncation, str(data.tokenizer.decode(first.input_ids.tolist())), target, notes)


def notes_of_first(config: TrialConfig, rows: Dataset) -> tuple[str, ...]:
    """What only the tokenizer shows of rows, by the first of them: lines about what is seldom meant.

    Raises:
        UserError: the tokenizer cannot be loaded, or one of them is not to be tokenized.
    """
    first = replace(rows, train=list(islice(rows.train, FIRST)), validation=list(islice(rows.validation, FIRST)))
    notes = prepare(first, config, models.load_tokenizer(config)).notes
    return notes if len(rows.train) <= FIRST else tuple(f"{note} (of the first {FIRST})" for note in notes)
