"""What there is without a training, beside what it has made: the metric, and some rows as both answer them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.digests import BASE, CHAT_TEMPLATE, check_unchanged, of_base, of_template
from bilora_ray.records import Untrained
from bilora_ray.training import model as models
from bilora_ray.training.compute.memory import Room, in_room
from bilora_ray.training.compute.precision import use_tensor_cores
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.evaluate import evaluate, predict
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import Loaded, load_data
from bilora_ray.training.result import result_of
from bilora_ray.training.rows import read_sources, rows_of
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Model

# How many rows are shown.
SHOWN = 8
KIND, OF_BASE = "kind", "base-model"


def compare(
    config: TrialConfig, folder: TrialFolder, adapter: Path, digests: Mapping[str, str], measured: bool
) -> Untrained:
    """Compare the adapter of a trial with its base model, on its validation rows and in its passes.

    Args:
        config: the trial's settings.
        folder: the trial's.
        adapter: the folder with its adapter.
        digests: see `fit`.
        measured: whether the baseline is asked for.

    Raises:
        UserError, MachineError, OSError, TrialFailure: as `fit`.
    """
    use_tensor_cores()
    data = load_data(config, shared=folder.examples)
    config = config.model_copy(update={"format": data.format})
    check_unchanged(config, digests, {**data.digests, BASE: of_base(config), CHAT_TEMPLATE: of_template(config)})
    config = config.model_copy(update={"label_names": data.label_names})
    model, fresh = models.load_base(config, data.tokenizer, data.label_names)
    with in_room(Room(config, ALONE, folder.passes)):
        baseline = _baseline(model, data, config) if measured else None
        before = [] if fresh else predict(model, data, config, SHOWN)
        after = predict(result_of(config).load(model, adapter, config, data.tokenizer), data, config, SHOWN)
    examples = []
    for row, told in enumerate(after):
        shown: dict[str, Any] = {"prompt": told.input, "expected": told.reference, "adapter": told.prediction}
        shown["base_model"] = before[row].prediction if before else None
        examples.append(shown if told.probability is None else {**shown, "probability": told.probability})
    return Untrained(baseline, examples)


def _baseline(model: Model, data: Loaded, config: TrialConfig) -> dict[str, Any]:
    found = TASKS[config.task].unlearned(rows_of(read_sources(config), config), config)
    if found:
        return {KIND: found.kind, config.metric: found.value}
    return {KIND: OF_BASE, **evaluate(model, data.validation, config, data.tokenizer)}
