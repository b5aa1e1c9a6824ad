"""The base model itself: what full fine-tuning trains, and leaves as transformers has it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.files import readable, temporary_folder
from bilora_ray.method import fuse
from bilora_ray.recipe import GENERATION
from bilora_ray.training import model as models
from bilora_ray.training.compute.bases import put_back
from bilora_ray.training.distributed.workers import random_states, set_random_states
from bilora_ray.training.tasks.base import Model, Processor


def begin(model: PreTrainedModel, config: TrialConfig, fresh: Sequence[str]) -> Model:
    """`model`, all of whose weights are trained but those that its class has frozen, as positions that are computed."""
    return model


def megabytes(model: Model) -> float:
    """What the weights of `model` take, those that are tied once, in MB (10^6 bytes)."""
    kept = model.state_dict().keys()
    parts = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in kept)]
    return sum(part.numel() * part.element_size() for part in parts) / 1e6


def write(
    model: Model, folder: Path, weights: Mapping[str, Tensor] | None, processor: Processor, stops: Sequence[int] | None
) -> None:
    """Write `model` and what makes its inputs as `save_pretrained` does; training may go on undisturbed."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:  # many a model's own would be refused as it is written, after hours
        model.generation_config = GenerationConfig()
    try:
        with _as_it_is(folder) as linked:
            model.save_pretrained(linked, state_dict=weights)
            processor.save_pretrained(linked)
    finally:
        if generation is not None:
            model.generation_config = generation
    if generation is not None and model.can_generate():
        ends = {"eos_token_id": list(stops)} if stops else {}
        told = {**json.loads(generation.to_json_string()), **ends}
        (folder / GENERATION).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    readable(folder)


@contextmanager
def _as_it_is(folder: Path) -> Iterator[Path]:
    """A link to `folder`: transformers would make a folder, and all above it, where a storage has just gone away.

    Raises:
        FileNotFoundError: it has.
    """
    with temporary_folder() as above:
        linked = above / folder.name
        linked.symlink_to(folder.absolute(), target_is_directory=True)
        try:
            yield linked
        except FileExistsError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from None


def load(base: PreTrainedModel, left: Path, config: TrialConfig, processor: Processor) -> Model:
    """The model that was left. `base` gives way: its weights are freed, for there may be no room for both."""
    nn.Module.to(base, torch.device("meta"))
    trained = config.model_copy(update={"model_name_or_path": str(left), "model_revision": None})
    return models.load_base(trained, processor, config.label_names)[0]


@contextmanager
def around(model: Model, config: TrialConfig) -> Iterator[Model]:
    """`model` with an adapter that does nothing, on all linear layers, for the block: what LoRA would adapt."""
    states = random_states()
    try:
        with put_back(model):
            yield fuse(models.add_primary(model, config, fresh=()))
    finally:
        set_random_states(states)
