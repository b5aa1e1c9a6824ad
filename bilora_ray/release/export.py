"""What trials leave, exported: a PEFT folder or a model with recipe and card, or a model with the adapter merged in."""

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
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import is_cached, loadable
from bilora_ray.recipe import (
    GENERATION,
    MERGED,
    MODEL_WEIGHTS,
    RECIPE,
    TEMPLATE,
    read_recipe,
    was_trained_whole,
    write_recipe,
)
from bilora_ray.release.base import base_bytes
from bilora_ray.release.names import outside, rename_base

# How much smaller weights are than published ones, which have 16 bits as a rule.
SMALLER = {"int8": 2, "nf4": 4}
UNREAD = "what was written was not loaded and compared"
OTHER = "its copy computes something else, and was not kept; is the disk sound?"

if TYPE_CHECKING:
    from torch import Tensor


def export_adapter(adapter: Path, output: Path, origin: Mapping[str, Any], check: bool = False) -> list[str]:
    """Copy what a trial has left to the new folder `output`, and note in its recipe and its card where it came from.

    Nothing there names a path of this machine: see `names`.

    Args:
        adapter: the folder, with an adapter or a model that was trained whole.
        output: the new one.
        origin: the study, the trial's number, the values of its metrics.
        check: whether to load what was written, and compare what it computes with what `adapter` does.

    Returns:
        Lines to tell about it.

    Raises:
        UserError: it is no adapter, or what was written computes something else.
    """
    from bilora_ray.release.card import write_card

    recipe = read_recipe(adapter)
    config = build(TrialConfig, recipe["settings"], f"{adapter / RECIPE}: settings")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        for file in adapter.iterdir():  # without their modes: the study's may be there to be read only
            shutil.copyfile(file, unfinished / file.name)
        settings = outside(config, template=(adapter / TEMPLATE).is_file()).model_dump(mode="json")
        told = {**origin, **recipe, "settings": settings}
        (unfinished / RECIPE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if not config.leaves_model:
            rename_base(unfinished, config)
        if (stops := recipe.get("stop_token_ids")) and not config.leaves_model:  # a model has its own
            (unfinished / GENERATION).write_text(json.dumps({"eos_token_id": stops}) + "\n", encoding="utf-8")
        write_card(unfinished, config, {**recipe, **origin}, whole=config.leaves_model)
        look = _checked_whole if config.leaves_model else _checked
        return look(adapter, unfinished, config) if check else []


def _checked(adapter: Path, written: Path, config: TrialConfig) -> list[str]:
    """Look whether the folder `written` computes, to the last bit, what `adapter` does.

    Returns:
        A line where that cannot be known here: a copy is worth something without its base model too.

    Raises:
        UserError: it computes something else.
    """
    name, revision = config.model_name_or_path, config.model_revision
    is_here = Path(loadable(name)).is_dir() or is_cached(
        name, revision, reads_images=TASK_FACTS[config.task].reads_images
    )
    if not is_here:
        return [f"{UNREAD}: the base model {name} is not on this machine"]
    from bilora_ray.training import model as models
    from bilora_ray.training.compute.memory import free_bytes
    from bilora_ray.training.probe.passes import logits_of

    size, free = base_bytes(config) // SMALLER.get(config.quantization or "", 1), free_bytes()
    if free is not None and size > free:
        return [f"{UNREAD}: the base model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"]
    try:
        check_base(config, read_recipe(adapter))
        tokenizer = models.load_processor(config)
        base, _ = models.load_base(config, tokenizer, config.label_names)
    except UserError as error:
        return [f"{UNREAD} ({error})"]
    # The copy is on a base that is untouched: what it does not hold, such as a head, it has of nobody.
    loaded = models.load_adapter(base, written)
    now = logits_of(loaded, config, tokenizer)
    before = logits_of(models.load_adapter(loaded.unload(), adapter), config, tokenizer)
    if not now.equal(before):
        raise UserError(f"{adapter}: {OTHER}")
    return []


def _checked_whole(model: Path, written: Path, config: TrialConfig) -> list[str]:
    """As `_checked`, of a model, which needs no other one."""
    from bilora_ray.training.compute.memory import free_bytes

    size, free = sum(file.stat().st_size for file in model.glob(MODEL_WEIGHTS)), free_bytes()
    if free is not None and size > free:
        return [f"{UNREAD}: the model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"]
    before, now = (
        _logits(None, config.model_copy(update={"model_name_or_path": str(folder), "model_revision": None}))
        for folder in (model, written)
    )
    if not now.equal(before):
        raise UserError(f"{model}: {OTHER}")
    return []


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
    from bilora_ray.release.card import write_card
    from bilora_ray.training.probe.passes import difference, tolerance

    recipe = read_recipe(adapter)
    check_merges(adapter)
    trained = build(TrialConfig, recipe["settings"], f"{adapter / RECIPE}: settings")
    config = trained.model_copy(update={"quantization": None})
    check_base(config, recipe)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        wanted, tied = _write_merged(adapter, config, recipe.get("stop_token_ids"), unfinished)
        known = {"digests": recipe.get("digests", {}), MERGED: True}
        write_recipe(unfinished, outside(config, (unfinished / TEMPLATE).is_file()), {**origin, **known})
        write_card(unfinished, config, {**recipe, **origin}, whole=True)
        readable(unfinished)
        gc.collect()  # a base model may be half of the memory
        written = config.model_copy(update={"model_name_or_path": str(unfinished), "model_revision": None})
        lost = difference(wanted, _logits(None, written), config)
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
            notes.append(_told_of_quantization(adapter, trained, wanted, _measured_again(written, origin)))
    return notes


def check_merges(adapter: Path) -> None:
    """UserError if there is no adapter in the folder `adapter`, but a model that was trained whole."""
    if was_trained_whole(adapter):
        raise UserError("--merge: what the trial has left is a whole model, with nothing to merge; leave --merge out")


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


def _told_of_quantization(adapter: Path, config: TrialConfig, wanted: Tensor, measured: str) -> str:
    from bilora_ray.training.probe.passes import difference

    line = f"quantization: the adapter was trained on {config.quantization} weights and is merged into whole ones"
    try:
        lost = difference(_logits(adapter, config), wanted, config)
    except UserError as error:
        return f"{line}; what that changes in the logits was not measured ({error}){measured}"
    return f"{line}, which moves the logits by {lost:.2%}{measured}"


def _measured_again(written: TrialConfig, origin: Mapping[str, Any]) -> str:
    """What the merged model, whose settings are `written`, is worth on the rows that the trial was judged by."""
    from bilora_ray.training.evaluate import evaluate, load_adapted

    metric = written.metric
    try:
        model, data, _ = load_adapted(None, written)
        known = written.model_copy(update={"label_names": data.label_names, "format": data.format})
        value = evaluate(model, data.validation, known, data.tokenizer)[metric]
    except UserError as error:
        return f"; {metric} was not measured again ({error})"
    was = f", {origin[metric]:.6g} with the adapter" if isinstance(origin.get(metric), int | float) else ""
    return f"; measured again on its validation rows, {metric} is {value:.6g}{was}"
