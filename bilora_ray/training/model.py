"""The base model with its primary adapter, and the tokenizer, as a trial's settings name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bilora_ray import builtin
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, first_line
from bilora_ray.paths import BUILTIN

AUTO_CLASS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
TASK_TYPE = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "sequence-classification": TaskType.SEQ_CLS,
}
# The heads that PEFT trains and saves by itself.
HEADS = ("classifier", "score")
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device() -> torch.device:
    """Where a trial computes: the GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(config: TrialConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token. UserError if there is none."""
    with _naming_the_model(config):
        tokenizer = AutoTokenizer.from_pretrained(source(config), **_hub_arguments(config))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"model_name_or_path: the tokenizer of {config.model_name_or_path} has no padding token")
    return tokenizer


def load_base(
    config: TrialConfig, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str] | None
) -> tuple[PreTrainedModel, list[str]]:
    """The frozen base model on `device()`, and the names of its modules that the files held no weights for.

    Those modules (a classification head, as a rule) start random, so they must be trained and saved with the
    adapter. Their random start is decided by `config.seed`.

    Raises:
        UserError: there is no such model, or it does not fit the task.
    """
    torch.manual_seed(config.seed)
    arguments: dict[str, Any] = {"dtype": DTYPE[config.precision], **_hub_arguments(config)}
    if config.task == "sequence-classification":
        names = dict(enumerate(label_names or ()))
        arguments |= {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}}
    with _naming_the_model(config):
        model, loading = AUTO_CLASS[config.task].from_pretrained(
            source(config), output_loading_info=True, use_safetensors=True, **arguments
        )
    text_config = model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise UserError(f"max_length: {config.max_length} is more than the model's {positions} positions")
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    fresh = _modules(model, loading["missing_keys"])
    heads = [name for name in HEADS if config.task == "sequence-classification" and hasattr(model, name)]
    for name in (*fresh, *heads):
        _keep_fp32(model.get_submodule(name))
    return model.to(device()), fresh


def add_primary(model: PreTrainedModel, config: TrialConfig, fresh: Sequence[str]) -> PeftModel:
    """`model` with the primary LoRA adapter, B = 0, decided by `config.seed`. UserError if no module is a target."""
    torch.manual_seed(config.seed)
    targets = config.target_modules
    lora = LoraConfig(
        task_type=TASK_TYPE[config.task],
        r=config.rank,
        lora_alpha=config.resolved_lora_alpha,  # type: ignore[arg-type] # PEFT divides it by r: a float is right
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(fresh) or None,
        revision=config.model_revision,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"target_modules: {first_line(error)}") from None


def enable_gradient_checkpointing(model: PeftModel) -> None:
    """Recompute activations in the backward pass. The frozen embeddings must pass a gradient on for that."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def source(config: TrialConfig) -> str:
    """What `from_pretrained` takes for `model_name_or_path`."""
    name = config.model_name_or_path
    return str(builtin.path(name.removeprefix(BUILTIN))) if name.startswith(BUILTIN) else name


def _hub_arguments(config: TrialConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.model_revision is not None:
        arguments["revision"] = config.model_revision
    return arguments


def _modules(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """The modules that own the parameters in `missing`, less the heads that PEFT trains and saves by itself."""
    known = {name for name, _ in model.named_parameters()}
    owners = {name.rpartition(".")[0] for name in missing if name in known}
    return sorted(owner for owner in owners if owner.split(".")[0] not in HEADS)


@contextmanager
def _naming_the_model(config: TrialConfig) -> Iterator[None]:
    """Turns what transformers raises for a wrong model into one line that names the setting."""
    name = config.model_name_or_path
    if name.startswith(("/", "~", ".")) and not Path(name).is_dir():
        raise UserError(f"model_name_or_path: no such folder: {name}")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_name_or_path: cannot load '{name}' ({first_line(error)})") from error


def _keep_fp32(module: nn.Module) -> None:
    """Have `module`, which is trained, compute in fp32 amid others that don't: in bf16 AdamW's moments would stall."""
    outer = next(module.parameters()).dtype

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    def leave(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(outer) if torch.is_tensor(output) else output

    if outer != torch.float32:
        module.float()
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
