"""Exported adapters: an ordinary PEFT folder with recipe and card, or a whole model with the adapter merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.digests import check_base
from bilora_ray.files import atomic_folder, readable
from bilora_ray.recipe import GENERATION, MERGED, RECIPE, read_recipe, write_recipe


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


def export_merged(adapter: Path, output: Path, origin: Mapping[str, Any]) -> None:
    """Write the base model with `adapter` merged into its weights, and its tokenizer, to the new folder `output`.

    A base that was quantised for training is loaded as it was published: a sum could not be written in 4 bits exactly.
    """
    from bilora_ray.training import model as models

    recipe = read_recipe(adapter)
    settings = {**recipe["settings"], "quantization": None}
    config = build(TrialConfig, settings, f"{adapter / RECIPE}: settings")
    check_base(config, recipe)
    tokenizer = models.load_tokenizer(config)
    base, _ = models.load_base(config, tokenizer, config.label_names)
    merged: Any = models.load_adapter(base, adapter).merge_and_unload()
    if stops := recipe.get("stop_token_ids"):
        merged.generation_config.eos_token_id = stops
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_recipe(unfinished, config, {**origin, "digests": recipe.get("digests", {}), MERGED: True})
        readable(unfinished)
