"""The primary adapter on a base model, and the optimizer of what is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bilora_ray.config import TrialConfig
from bilora_ray.errors import SAME_AGAIN, UserError, comes_again, first_line, refusal
from bilora_ray.method import MethodAdamW, build_method, fuse, primary_parameters, settings_of
from bilora_ray.method.base import Place
from bilora_ray.method.primaries import DIRECTIONS, await_start, starts, with_exact_magnitudes
from bilora_ray.method.registry import stay
from bilora_ray.training.model.base import beside_heads, heads_of
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Model

# What models call the parts that look back at a text.
ATTENTION = re.compile(r"att(entio)?n\w*\.", re.IGNORECASE)


def add_primary(model: PreTrainedModel, config: TrialConfig, fresh: Sequence[str]) -> PeftModel:
    """`model` with the primary adapter, B = 0, decided by `config.seed`. UserError if no module is a target.

    One with a start awaits it: see `method.primaries`.

    Args:
        model: as `load_base` gives it.
        config: the settings.
        fresh: modules that start random, which are trained and saved with the adapter.
    """
    torch.manual_seed(config.seed)
    task, targets, whole = TASKS[config.task], config.target_modules, _saved_whole(model, fresh, config)
    if targets == "all-linear" and not _has_linear(model, but=whole):
        kind = type(model).__name__
        raise UserError(f"target_modules: adapters are on linear layers, and {kind} has none beside its head")
    # PEFT copies each module with such an end of its name, DistilBERT's pre_classifier too: LoRA cannot be on it.
    copied = [name for name, _ in model.named_modules() if name.endswith(task.heads)]
    hidden = [name for name in copied if name.rpartition(".")[2] not in task.heads]
    # Of those of texts PEFT knows by itself that they are trained whole.
    known = [] if task.peft_type == "SEQ_CLS" else heads_of(model, config)
    lora = LoraConfig(
        task_type=None if task.peft_type is None else TaskType[task.peft_type],
        r=config.rank,
        lora_alpha=config.resolved_lora_alpha,  # type: ignore[arg-type] # PEFT divides it by r: a float is right
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=[*hidden, *known] or None,
        modules_to_save=whole or None,
        use_dora=config.primary == "dora",
        use_rslora=config.primary == "rslora",
        revision=config.model_revision,
    )
    try:
        adapted = with_exact_magnitudes(get_peft_model(model, lora))
        return await_start(adapted, DIRECTIONS[config.primary]) if config.primary in DIRECTIONS else adapted
    except SAME_AGAIN as error:
        raise UserError(_naming_others(first_line(error), model, config)) from None


def adapter_mb(model: PeftModel) -> float:
    """What the weights of the exported adapter take, in MB (10^6 bytes)."""
    parts = [*primary_parameters(model).values(), *starts(model).values()]  # with a start, of twice the rank
    return sum(part.numel() * part.element_size() for part in parts) / 1e6


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """`model` with the exported `adapter`, whose layers compute as they did in training.

    Raises:
        UserError: the adapter's files are torn, or of another model.
        MachineError: they cannot be read now.
    """
    try:
        return fuse(PeftModel.from_pretrained(model, str(adapter)))
    except Exception as error:  # of PEFT, torch or the model's own code; what is a device's is raised again
        if not isinstance(error, OSError | SafetensorError) and not comes_again(error):
            raise
        raise refusal(f"{adapter}: is no adapter of this base model ({first_line(error)})", error) from error


def build_optimizer(model: Model, config: TrialConfig, place: Place = stay) -> MethodAdamW:
    """The optimizer of the settings' method, with all that it adds to `model`. UserError if it cannot train that.

    Args:
        model: with its primary adapter; of `full` fine-tuning without one.
        config: the settings.
        place: see `build_method`.
    """
    settings = {key: getattr(config, key) for key in settings_of(config.method)}
    try:
        return build_method(config.method, model, place, **settings)
    except ValueError as error:  # the settings are checked, so what doesn't fit is a module
        raise UserError(_naming_others(str(error), model, config)) from None


def _naming_others(problem: str, model: nn.Module, config: TrialConfig) -> str:
    """The line about target modules; where not all linear layers can have an adapter, with some that can."""
    line = f"target_modules: {problem}"
    if config.target_modules != "all-linear":
        return line
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    inside = [name.removesuffix(".base_layer") for name in beside_heads(linear, config) if ".lora_" not in name]
    attention = [name for name in inside if ATTENTION.search(name)]
    others = {name.rpartition(".")[2] for name in attention or inside if "." in name}
    others = {name for name in others if f"'{name}'" not in problem}
    return f"{line}; what can have one: target_modules: [{', '.join(sorted(others))}]" if others else line


def enable_gradient_checkpointing(model: Model) -> None:
    """Recompute activations in the backward pass. The frozen embeddings must pass a gradient on for that."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if isinstance(model, PeftModel):
        model.enable_input_require_grads()


def _saved_whole(model: PreTrainedModel, fresh: Sequence[str], config: TrialConfig) -> list[str]:
    """The modules that are trained and saved beside the adapter, less those that PEFT adds by itself."""
    heads = heads_of(model, config) if TASKS[config.task].peft_type is None else []
    return heads + beside_heads(fresh, config)


def _has_linear(model: nn.Module, but: Sequence[str]) -> bool:
    """Whether an adapter can be on a layer of `model` that is in none of the modules `but`."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return any(not f"{name}.".startswith(tuple(f"{whole}." for whole in but)) for name in layers)
