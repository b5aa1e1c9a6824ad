"""A trial without its weights and its steps: most of what it would refuse shows in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.compute.compiled import why_not
from bilora_ray.training.compute.varlen import may_flatten, needs_no_padding
from bilora_ray.training.data.truncation import Truncation
from bilora_ray.training.loading import Loaded, load_data, prepare
from bilora_ray.training.probe.passes import check_passes, check_tokens, reading
from bilora_ray.training.result import result_of
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset, on_device

# So many rows show what a chat template does, in a moment.
FIRST = 100
# Parameters of a model that gets random weights in seconds, and 2 GiB at the most.
SMALL = 500_000_000
# Of so many rows the longest are read.
READ = 1000


@dataclass(frozen=True)
class Rehearsal:
    """What a trial would begin with.

    Attributes:
        rows: how many there are and what `max_length` takes from them, by split: `train` and `validation`.
        input: the first training row, as the model reads it: a text with special tokens, an image's name and shape.
        target: the part of it, or the completion or label, that the model learns.
        notes: lines about what is allowed and yet seldom meant, and shows in tokens only.
    """

    rows: Mapping[str, Truncation]
    input: str
    target: str
    notes: tuple[str, ...]


def rehearse(config: TrialConfig, here: bool = True) -> Rehearsal:
    """Tokenize the data, of large ones the beginning, and put what the method adds on the base model's shape.

    A base model that is small and would be trained here reads the longest of the first rows too, with random weights:
    some mistakes show in no shape. Those of a larger one show when a trial has loaded it.

    Args:
        config: the settings.
        here: whether trials run on this machine, so that its packages and GPUs are theirs.

    Raises:
        UserError: the data, the tokenizer, the model, `max_length` or a target module is not as the settings say, or a
            package that they need is missing.
    """
    data = load_data(config, beginning=True)
    shape = models.load_shape(config, data.label_names, here)
    check_tokens(shape, config, data.tokenizer, chain(data.train, data.validation))
    is_small = sum(parameter.numel() for parameter in shape.parameters()) <= SMALL
    models.build_optimizer(result_of(config).begin(shape, config, ()), config)
    if here and is_small:
        _read(config, data)
    task, first = TASKS[config.task], data.train[0]
    target = task.learned(first, data.tokenizer, data.label_names)
    notes = (
        *data.notes,
        *_of_kernel(shape, config),
        *Truncation.of(data.truncation.values()).notes(config.model_dump()),
        *(_not_compiled() if here and config.torch_compile else ()),
    )
    return Rehearsal(data.truncation, task.read(first, data.tokenizer), target, notes)


def least_adapter_mb(config: TrialConfig, label_names: Sequence[str] | None) -> float:
    """What a trial leaves takes, in MB, by the base model's shape; what its files hold no weights of is more."""
    left = result_of(config)
    return left.megabytes(left.begin(models.load_shape(config, label_names, here=False), config, ()))


def _of_kernel(shape: Any, config: TrialConfig) -> Iterator[str]:
    kernel, kind = config.attn_implementation or "", type(shape).__name__
    if TASKS[config.task].continues and needs_no_padding(kernel) and not may_flatten(shape, kernel):
        yield f"attn_implementation: rows are padded; by {kernel}, {kind} cannot read them one after another"


def _not_compiled() -> Iterator[str]:
    reason = why_not(models.device().type)
    if reason is not None:
        yield f"torch_compile: this machine cannot compile, so that trials compute as without it ({reason})"


def _read(config: TrialConfig, data: Loaded) -> None:
    model, task = models.load_stand_in(config, data.tokenizer, data.label_names), TASKS[config.task]
    check_passes(model, models.plain(config), data.tokenizer)
    rows = nlargest(min(2, config.per_device_train_batch_size), islice(data.train, READ), key=attrgetter("length"))
    with reading(config):
        task.loss(model, on_device(task.collate(rows, data.tokenizer), model))


def notes_of_first(config: TrialConfig, rows: Dataset) -> tuple[str, ...]:
    """What only the tokenizer shows of rows, by the first of them: lines about what is seldom meant.

    Raises:
        UserError: the tokenizer cannot be loaded, or one of them is not to be tokenized.
    """
    first = replace(rows, train=list(islice(rows.train, FIRST)), validation=list(islice(rows.validation, FIRST)))
    notes = prepare(first, config, models.load_processor(config)).notes
    return notes if len(rows.train) <= FIRST else tuple(f"{note} (of the first {FIRST})" for note in notes)
