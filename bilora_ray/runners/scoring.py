"""What an adapter is worth on the test rows, measured in a process of the cluster, as a trial's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import not_again
from bilora_ray.runners.task import import_training


def score(adapter: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the adapter in a folder, with the `settings` of its trial, on the rows that they name to test on.

    Raises:
        UserError: the rows or the base model are not as the settings say, or it is too large for this machine.
    """
    with not_again():
        import_training()
        from bilora_ray.recipe import evaluation_config
        from bilora_ray.training.evaluate import evaluate, load_adapted

        # The adapter knows the labels of its training. What it was allowed it still is: it is our own.
        tested = TrialConfig(**settings).on_test().model_dump(exclude={"label_names", "format", "metric"})
        config = evaluation_config(Path(adapter), tested)
        model, data, _ = load_adapted(Path(adapter), config)
        config = config.model_copy(update={"label_names": data.label_names, "format": data.format})
        return evaluate(model, data.validation, config, data.tokenizer)
