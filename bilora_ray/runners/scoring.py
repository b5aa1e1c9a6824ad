"""What adapters are worth on the test rows, measured in a process of the cluster, as a trial's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import not_again
from bilora_ray.runners.task import EXPECTED, import_training


def score(adapter: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the adapter in a folder, with the `settings` of its trial, on the rows that they name to test on.

    With `retention_data` they have `forgetting`, too: see `training.probe.retention`.

    Raises:
        UserError: the rows or the base model are not as the settings say, or it is too large for this machine.
    """
    with not_again():
        import_training()
        from bilora_ray.recipe import evaluation_config, is_whole
        from bilora_ray.training.evaluate import evaluate, load_adapted
        from bilora_ray.training.probe.retention import forgetting, forgetting_whole

        # The adapter knows the labels of its training. What it was allowed it still is: it is our own.
        known, base, whole = {"label_names", "format", "metric"}, set[str](), is_whole(Path(adapter))
        if whole:  # which is its own base model
            base = {"model_name_or_path", "model_revision"}
        # How flat it is, is asked apart, of the rows that the others are asked of.
        settings = {**settings, "sharpness_radius": None}
        tested = TrialConfig(**settings).on_test().model_dump(exclude=known | base)
        config = evaluation_config(Path(adapter), tested)
        model, data, _ = load_adapted(Path(adapter), config)
        config = config.model_copy(update={"label_names": data.label_names, "format": data.format})
        metrics = evaluate(model, data.validation, config, data.tokenizer)
        config = config.model_copy(update={key: settings.get(key) for key in ("retention_data", *base)})
        forgotten = forgetting_whole if whole else forgetting
        return {**metrics, **forgotten(model, config, data.tokenizer)}


class Scorer:
    """A process of the cluster that scores adapters, one after the other. Errors come back as they are.

    Args:
        cpus: that it may use.
        gpus: the same; a part of one is shared.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        import_training()
        import torch

        from bilora_ray.training.compute.memory import keep_to_share

        torch.set_num_threads(max(1, int(cpus)))  # as Ray says it to a trial, or the last digits were others
        keep_to_share(gpus)

    def score(self, adapter: str, settings: Mapping[str, Any], radius: float | None) -> Any:
        """As `score`; with a `radius`, `sharpness` too, on the validation rows of its training.

        Of a whole model it is that of its `target_modules`, which the settings may have beside what its training read.
        """
        try:
            found = score(adapter, settings)
            if radius is None:
                return found
            return {**found, "sharpness": _sharpness(adapter, radius, settings["target_modules"])}
        except EXPECTED as error:
            return error


def _sharpness(adapter: str, radius: float, targets: str | Sequence[str]) -> float:
    import torch

    from bilora_ray.recipe import evaluation_config
    from bilora_ray.training.evaluate import load_adapted
    from bilora_ray.training.probe.sharpness import sharpness
    from bilora_ray.training.result import result_of

    with not_again():
        asked = {"sharpness_radius": radius, "predict_with_generate": False, "target_modules": targets}
        config = evaluation_config(Path(adapter), asked)
        model, data, _ = load_adapted(Path(adapter), config)
        config = config.model_copy(update={"label_names": data.label_names, "format": data.format})
        model.eval()
        with torch.no_grad(), result_of(config).around(model, config) as seen:
            return sharpness(seen, data.validation, config, data.tokenizer)["sharpness"]
