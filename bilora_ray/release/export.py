"""Exported adapters: an ordinary PEFT folder with recipe and card, or a whole model with the adapter merged in."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.digests import check_base
from bilora_ray.errors import UserError
from bilora_ray.files import atomic_folder, readable
from bilora_ray.recipe import GENERATION, MERGED, RECIPE, read_recipe, write_recipe

if TYPE_CHECKING:
    from torch import Tensor


def export_adapter(adapter: Path, output: Path, origin: Mapping[str, Any]) -> None:
    """Copy `adapter` to the new folder `output`, and note in its recipe and its card where it came from."""
    from bilora_ray.release.card import write_card

    recipe = read_recipe(adapter)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        for file in adapter.iterdir():  # without their modes: the study's may be there to be read only
            shutil.copyfile(file, unfinished / file.name)
        (unfinished / RECIPE).write_text(json.dumps({**origin, **recipe}, indent=2) + "\n", encoding="utf-8")
        if stops := recipe.get("stop_token_ids"):
            (unfinished / GENERATION).write_text(json.dumps({"eos_token_id": stops}) + "\n", encoding="utf-8")
        config = build(TrialConfig, recipe["settings"], f"{adapter / RECIPE}: settings")
        write_card(unfinished, config, {**recipe, **origin})


def export_merged(adapter: Path, output: Path, origin: Mapping[str, Any]) -> list[str]:
    """Write the base model with `adapter` merged into its weights, and its tokenizer, to the new folder `output`.

    Where the task reads images, the image processor takes the tokenizer's place.

    A base that was quantised for training is loaded as it was published: a sum could not be written in 4 bits exactly.
    What is written is read again, and gets its name if it computes what the base and the adapter do.

    Returns:
        Lines about what the merged model has lost, each beginning with a setting.

    Raises:
        UserError: the adapter or its base cannot be read, or their sum cannot be written so that it is what they are.
    """
    from bilora_ray.training.probe.passes import difference, tolerance

    recipe = read_recipe(adapter)
    trained = build(TrialConfig, recipe["settings"], f"{adapter / RECIPE}: settings")
    config = trained.model_copy(update={"quantization": None})
    check_base(config, recipe)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        wanted, tied = _write_merged(adapter, config, recipe.get("stop_token_ids"), unfinished)
        write_recipe(unfinished, config, {**origin, "digests": recipe.get("digests", {}), MERGED: True})
        readable(unfinished)
        gc.collect()  # a base model may be half of the memory
        written = {"model_name_or_path": str(unfinished), "model_revision": None}
        lost = difference(wanted, _logits(None, config.model_copy(update=written)), config)
        if not lost <= tolerance(config):
            without = f", or train without {' and '.join(tied)} among target_modules" if tied else ""
            raise UserError(
                f"{adapter}: cannot be merged: read again, the merged model's logits are {lost:.0%} off those of the "
                f"base model with the adapter, so that it was not written; export it without --merge{without}"
            )
    notes = []
    if config.precision != "fp32":
        notes.append(f"precision: the sum is rounded to {config.precision}, which moves the logits by {lost:.2%}")
    if trained.quantization is not None:
        notes.append(_told_of_quantization(adapter, trained, wanted))
    return notes


def _write_merged(
    adapter: Path, config: TrialConfig, stops: list[int] | None, folder: Path
) -> tuple[Tensor, list[str]]:
    """Write model and tokenizer; the logits of the base model with the adapter before, and its tied targets."""
    from bilora_ray.release.merge import merged, tied_targets
    from bilora_ray.training import model as models
    from bilora_ray.training.probe.passes import logits_of

    tokenizer = models.load_processor(config)
    base, _ = models.load_base(config, tokenizer, config.label_names)
    model = models.load_adapter(base, adapter)
    logits = logits_of(model, config, tokenizer)
    tied = sorted(tied_targets(model))
    whole = merged(model)
    if stops:
        whole.generation_config.eos_token_id = stops
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return logits, tied


def _logits(adapter: Path | None, config: TrialConfig) -> Tensor:
    """What the base model of `config`, with `adapter` if there is one, makes of rows that are made up."""
    from bilora_ray.training import model as models
    from bilora_ray.training.probe.passes import logits_of

    tokenizer = models.load_processor(config)
    base, _ = models.load_base(config, tokenizer, config.label_names)
    return logits_of(base if adapter is None else models.load_adapter(base, adapter), config, tokenizer)


def _told_of_quantization(adapter: Path, config: TrialConfig, wanted: Tensor) -> str:
    from bilora_ray.training.probe.passes import difference

    line = f"quantization: the adapter was trained on {config.quantization} weights and is merged into whole ones"
    try:
        lost = difference(_logits(adapter, config), wanted, config)
    except UserError as error:
        return f"{line}; what that changes was not measured ({error})"
    return f"{line}, which moves the logits by {lost:.2%}"
