"""What an adapter or a model was made from, as JSON beside its weights: no other file says what the data were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilora_ray.checking import build, completed
from bilora_ray.config import HUB_KERNEL, TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.facts import WHOLE
from bilora_ray.settings import of_other_sources

RECIPE, MERGED = "bilora_ray.json", "merged"
# The id of what batches were padded with, for models that read a row at its last token that is not that.
PAD = "pad_token_id"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Of a model that full fine-tuning leaves.
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model*.safetensors"
# What transformers and vLLM know these files by.
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"


def write_recipe(adapter: Path, settings: TrialConfig, origin: Mapping[str, Any]) -> None:
    """Keep with an adapter what it came from: PEFT's own files say nothing of rho or the data.

    Args:
        adapter: the folder that PEFT wrote, or transformers.
        settings: of the trial.
        origin: JSON values such as the step, the study and the trial's number.
    """
    recipe = {**origin, "settings": settings.model_dump(mode="json")}
    (adapter / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def read_recipe(adapter: Path) -> dict[str, Any]:
    """What `write_recipe` kept of what a trial has left. UserError if `adapter` is not such a folder."""
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such folder")
    if was_trained_whole(adapter):
        if not (adapter / MODEL_CONFIG).is_file() or not any(adapter.glob(MODEL_WEIGHTS)):
            raise UserError(f"{adapter}: {MODEL_CONFIG} or {MODEL_WEIGHTS} is missing of the model that was trained")
        return _recipe(adapter)
    if not (adapter / CONFIG).is_file():
        raise UserError(f"{adapter}: no adapter here ({CONFIG} is missing)")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: {WEIGHTS} is missing; weights in another format are not read")
    if not (adapter / RECIPE).is_file():
        raise UserError(f"{adapter}: {RECIPE} is missing: this adapter was not trained here, so give its settings")
    return _recipe(adapter)


def known_of(exported: Path) -> dict[str, Any]:
    """The recipe of an adapter or a merged model, its `digests` among it; empty where there is none."""
    recipe = _recipe(exported) if (exported / RECIPE).is_file() else {}
    return {**recipe, "digests": recipe.get("digests", {})}


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a whole model: `export_merged` wrote it, or it was trained whole."""
    return (folder / RECIPE).is_file() and (bool(_recipe(folder).get(MERGED)) or was_trained_whole(folder))


def was_trained_whole(folder: Path) -> bool:
    """Whether `folder` is what full fine-tuning has left, or a copy of that."""
    return (folder / RECIPE).is_file() and _recipe(folder)["settings"]["method"] in WHOLE


def evaluation_config(exported: Path, settings: Mapping[str, Any], base_model: bool = False) -> TrialConfig:
    """The settings to evaluate an exported adapter, or a whole model, with: those of its training, `settings` on top.

    Without any, the evaluation is that of the training: on its validation rows. Only `settings` can allow remote code,
    a kernel of the Hub among it: an adapter may be a stranger's.

    Args:
        exported: the folder.
        settings: instead of the training's.
        base_model: of a whole model, name the one that it was made from.

    Raises:
        UserError: the folder is neither, or the settings do not go together.
    """
    whole = is_whole(exported)
    recipe = {**(_recipe(exported) if whole else read_recipe(exported))["settings"], "trust_remote_code": False}
    if HUB_KERNEL.fullmatch(str(recipe.get("attn_implementation"))):  # is code too
        recipe["attn_implementation"] = None
    # Nothing is judged by it, and an evaluation without generation may not know it.
    recipe.pop("metric", None)
    if whole and not base_model:
        if "model_name_or_path" in settings:
            raise UserError(f"{exported}: is a whole model, so model_name_or_path says nothing")
        recipe |= {"model_name_or_path": str(exported.resolve()), "model_revision": None}
    return build(TrialConfig, of_other_sources(recipe, settings), f"{exported / RECIPE}: settings")


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        if not isinstance(recipe.get("digests", {}), dict):
            raise TypeError
        settings = completed(TrialConfig, recipe["settings"])
        if settings["chat_template"] is not None and (folder / TEMPLATE).is_file():
            settings["chat_template"] = str((folder / TEMPLATE).resolve())  # the one that was trained with
        return {**recipe, "settings": settings}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / RECIPE}: is not what was exported; export the adapter again") from None
