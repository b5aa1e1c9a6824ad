"""What a trial trains, and what it leaves: an adapter on a base model, or the model itself.

Who trains, measures or exports asks `result_of`, and need not know which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.training.result import adapter, whole
from bilora_ray.training.tasks.base import Model, Processor


@dataclass(frozen=True)
class Result:
    """What the trials of a kind train and leave.

    Attributes:
        begin: the base model, the settings and its modules that start random -> what is trained.
        megabytes: of what is trained -> what the weights take that are left, in MB (10^6 bytes).
        write: what is trained; a folder; by name all weights that are trained, where the model has only parts of them;
            what makes the model's inputs; and the tokens that end a text, where they are not the model's own.
        load: the base model, which is used up; what was left; the settings; what makes inputs -> the trained model.
        around: of what is trained, for a block, a model whose layers tell which weights sharpness is measured of.
    """

    begin: Callable[[PreTrainedModel, TrialConfig, Sequence[str]], Model]
    megabytes: Callable[[Model], float]
    write: Callable[[Model, Path, Mapping[str, Tensor] | None, Processor, Sequence[int] | None], None]
    load: Callable[[PreTrainedModel, Path, TrialConfig, Processor], Model]
    around: Callable[[Model, TrialConfig], AbstractContextManager[Model]]


ADAPTER = Result(adapter.begin, adapter.megabytes, adapter.write, adapter.load, adapter.around)
MODEL = Result(whole.begin, whole.megabytes, whole.write, whole.load, whole.around)


def result_of(config: TrialConfig) -> Result:
    """What the trial of `config` trains and leaves."""
    return MODEL if config.leaves_model else ADAPTER
