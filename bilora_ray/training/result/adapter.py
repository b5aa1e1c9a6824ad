"""An adapter on a base model that stays as it is: what most methods train, and leave as PEFT has it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.files import temporary_folder
from bilora_ray.method import export_primary
from bilora_ray.training import model as models
from bilora_ray.training.tasks.base import Model, Processor


def begin(model: PreTrainedModel, config: TrialConfig, fresh: Sequence[str]) -> Model:
    """See `model.add_primary`."""
    return models.add_primary(model, config, fresh)


def megabytes(model: Model) -> float:
    """See `model.adapter_mb`."""
    return models.adapter_mb(model)


def write(
    model: Model, folder: Path, weights: Mapping[str, Tensor] | None, processor: Processor, stops: Sequence[int] | None
) -> None:
    """See `method.export_primary`."""
    # PEFT would make its folder, and all above it, where a storage that was there has just gone away.
    with temporary_folder() as written:
        export_primary(model, written, weights)
        for file in written.iterdir():
            shutil.copyfile(file, folder / file.name)


def load(base: PreTrainedModel, left: Path, config: TrialConfig, processor: Processor) -> Model:
    """See `model.load_adapter`."""
    return models.load_adapter(base, left)


@contextmanager
def around(model: Model, config: TrialConfig) -> Iterator[Model]:
    """`model` itself."""
    yield model
