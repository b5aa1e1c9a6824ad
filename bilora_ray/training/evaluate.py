"""What an adapter is worth: loss and metrics over the validation rows, with the auxiliary out of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.digests import check_base
from bilora_ray.recipe import is_whole, known_of
from bilora_ray.training import model as models
from bilora_ray.training.compute.cutting import Budget, cut, positions
from bilora_ray.training.compute.generation import Read, Reader
from bilora_ray.training.compute.memory import current_room, in_parts
from bilora_ray.training.compute.precision import use_tensor_cores
from bilora_ray.training.compute.varlen import batch_of, is_flat
from bilora_ray.training.data.batches import in_row_order, longest_first
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.loading import Loaded, load_data
from bilora_ray.training.probe.passes import Probe, check_passes, check_tokens
from bilora_ray.training.probe.sharpness import sharpness
from bilora_ray.training.result import result_of
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, Model, Prediction, Processor, on_device

R = TypeVar("R")

# Model -> what was found when it was asked: whether it writes as it reads.
_TELLING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def evaluate(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """The metrics of `config.available_metrics`, at the weights that are exported: those of evaluation mode.

    Several workers share the batches, which are those of one worker: the metrics are the same, to the last bit.

    Args:
        model: on the device where it shall compute. It is left in the mode it came in.
        examples: validation rows, with prompts if `config.predict_with_generate`.
        config: task, batch size and what to measure, with the names of the labels.
        tokenizer: decodes generated text.
        workers: who share the work; each gets the metrics.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            metrics, read = _losses(model, examples, config, tokenizer, workers)
            if config.predict_with_generate:
                metrics |= TASKS[config.task].generated(model, examples, config, tokenizer, workers, read)
            if config.sharpness_radius is not None:
                with result_of(config).around(model, config) as seen:
                    metrics |= sharpness(seen, examples, config, tokenizer)
    finally:
        model.train(was_training)
    return metrics


def load_adapted(adapter: Path | None, config: TrialConfig) -> tuple[Model, Loaded, list[str]]:
    """The base model of `config` with an exported adapter, or alone; the data; and what to tell who measures it.

    Raises:
        UserError: the data or the base model are not as `config` says, or the adapter is not the base model's.
    """
    data = load_data(config, splits=("validation",))
    model, told, random = load_model(adapter, config, data.tokenizer, data.label_names, data.validation)
    return model, data, [*told, *(random if adapter is None else []), *data.notes]


def load_model(
    adapter: Path | None,
    config: TrialConfig,
    processor: Processor,
    label_names: Sequence[str] | None,
    examples: Iterable[Example] = (),
) -> tuple[Model, list[str], list[str]]:
    """The base model of `config` with an exported adapter, or alone, once it is known that it can be measured.

    Args:
        adapter: the folder; None: the base model alone. Of a whole model `config` names the same folder.
        config: the settings.
        processor: the base's own.
        label_names: names by label index; None where the task has no labels.
        examples: the base must have an embedding of each of their tokens.

    Returns:
        The model; what to tell who measures it; and what to tell who measures the base model, without an adapter.

    Raises:
        UserError: the base model is not as `config` says, or the adapter is not the base model's.
    """
    use_tensor_cores()
    alone = adapter is None or is_whole(adapter)
    other = None if alone or adapter is None else check_base(config, known_of(adapter))
    model: Model
    model, fresh = models.load_base(config, processor, label_names)
    check_tokens(model, config, processor, examples)
    check_passes(model, config, processor, training=False)
    missing = f"its files hold no weights of {', '.join(fresh)}"
    random = [f"the head of base model {config.model_name_or_path} is random: {missing}"] if fresh else []
    if not alone and adapter is not None:
        model = models.load_adapter(model, adapter)
    return model, [other] if other else [], random


def predict(model: Model, data: Loaded, config: TrialConfig, count: int) -> list[Prediction]:
    """What `model` makes of the first `count` validation rows; text is decoded greedily, as for `eval_exact_match`.

    Args:
        model: as `load_adapted` gives it.
        data: the same.
        config: the settings.
        count: rows, or fewer if there are not so many.
    """
    model.eval()
    # Of a chat that became several, one is judged.
    judged = [example for example in data.validation if example.prompt_ids is not None]
    task, examples = TASKS[config.task], (judged or data.validation)[:count]
    with torch.no_grad():
        return task.predict(model, examples, config, data.tokenizer, data.label_names, ALONE)


def _losses(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
) -> tuple[dict[str, float], list[Read] | None]:
    """The metrics of a pass over `examples`; and what it says of how each would be written, if it does."""
    task = TASKS[config.task]
    telling = _tells_what_is_written(model, config, tokenizer, workers)
    sides = [task.sides(example) for example in examples]
    padded = not is_flat(task, model)
    reader = Reader(model, workers, writes_on=telling and task.continues and padded)

    def measure(rows: Sequence[int]) -> list[tuple[Any, list[Read]]]:
        part = [examples[row] for row in rows]
        batch = on_device(batch_of(task, model, part, tokenizer), model)
        with reader.reading(positions([sides[row] for row in rows], padded)) as kept:
            logits, targets = task.forward(model, batch)
        counts = [int(task.target_count([example])) for example in part] if telling else []
        return [(task.measure(logits, targets), reader.read(logits, targets, counts, kept) if telling else [])]

    batches, found = in_passes(model, examples, config, measure, workers)
    read = in_row_order(batches, [read for _, of_rows in found for read in of_rows]) if telling else None
    return task.metrics([part for part, _ in found], config), read


def in_passes(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    compute: Callable[[Sequence[int]], list[R]],
    workers: Workers = ALONE,
) -> tuple[list[list[int]], list[R]]:
    """The rows of each evaluation pass over `examples`, and all that `compute` gives for them, in that order.

    Rows of like length come together, the longest first; a pass that has no room is halved.

    Args:
        model: reads them.
        examples: rows.
        config: how many at once.
        compute: indices of rows -> a list of what was found.
        workers: who share the passes.
    """
    task = TASKS[config.task]
    padded = not is_flat(task, model)
    sides = [task.sides(example) for example in examples]
    order = longest_first([sum(side) for side in sides])
    room = current_room(config, workers)
    computed = in_parts(room, "evaluation", compute, lambda rows: positions([sides[row] for row in rows], padded))
    budget = Budget(config.per_device_eval_batch_size, proven=room.proven.evaluation, padded=padded)
    parts = cut([sides[row] for row in order], budget, models.device().type)
    batches = [[order[place] for place in part] for part in parts]
    return batches, list(chain.from_iterable(workers.map(computed, batches)))


def _tells_what_is_written(
    model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase, workers: Workers
) -> bool:
    """Whether a pass over completions shows how `model` would write them; it is asked once a model.

    Of one that has an encoder the pass is the same. Of one that writes one text at a time, or of which no worker has
    all weights, nothing is assumed.
    """
    if not config.predict_with_generate or not config.writes_several or workers.sharded:
        return False
    if model not in _TELLING:
        probe = Probe(model, config, tokenizer)
        found = not TASKS[config.task].continues or probe.writes_as_it_reads()
        _TELLING[model] = all(workers.gather(found))  # or each would have other batches to write
    return _TELLING[model]
