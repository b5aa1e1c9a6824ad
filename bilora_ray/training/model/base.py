"""The base model and its tokenizer, as a trial's settings name them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS
from bilora_ray.training.compute import varlen
from bilora_ray.training.compute.bases import Base, key_of, take
from bilora_ray.training.compute.precision import dtype_of
from bilora_ray.training.data.chat import use_template
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.model.files import from_pretrained, here_first, hub_arguments, naming_the_model, source
from bilora_ray.training.model.rounding import keep_fp32, keep_statistics, reread, round_images
from bilora_ray.training.probe.passes import reads_tokens
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Processor, check_positions

AUTO_CLASS: dict[str, Any] = {task: getattr(transformers, facts.model_class) for task, facts in TASK_FACTS.items()}
# On some CPUs bitsandbytes packs 4-bit weights for an evaluation, and unpacks them for training to others than before.
PACKS = "support_avx512bf16_for_cpu"
NOWHERE = torch.device("meta")


def device() -> torch.device:
    """Where a trial computes: the GPU that this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(config: TrialConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token. UserError if there is none that can be read."""
    with naming_the_model(config):
        tokenizer = from_pretrained(AutoTokenizer, config, hub_arguments(config))
    use_template(tokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"model_name_or_path: the tokenizer of {config.model_name_or_path} has no padding token")
    return tokenizer


def load_processor(config: TrialConfig) -> Processor:
    """What makes the base model's inputs: its tokenizer, or its image processor where the task reads images.

    Images are resized by Pillow even where torchvision is installed: the two round differently.

    Raises:
        UserError: there is none that can be read.
    """
    if not TASK_FACTS[config.task].reads_images:
        return load_tokenizer(config)
    with naming_the_model(config):
        return from_pretrained(AutoImageProcessor, config, {**hub_arguments(config), "backend": "pil"})


def take_base(
    config: TrialConfig, tokenizer: Processor, label_names: Sequence[str] | None, workers: Workers, keep: bool
) -> Base:
    """As `load_base`; if the last trial of this process has kept the same base, nothing is loaded.

    Args:
        config: the settings.
        tokenizer: the base's own.
        label_names: names by label index; None where the task has no labels.
        workers: who train the trial. A base of which each has a part is not kept.
        keep: whether to keep it for the next trial of this process, once this one has ended.

    Raises:
        UserError, MachineError: as `load_base`.
    """
    kept = keep and not workers.sharded
    key = key_of(config, label_names, getattr(tokenizer, "pad_token_id", None), device()) if kept else None
    base = take(key, config.seed, partial(load_base, config, tokenizer, label_names, workers))
    if config.leaves_model:  # then it is what is trained, and no base for the next one
        base.key = None
    _check_positions(base.model, config)
    return base


def load_base(
    config: TrialConfig,
    tokenizer: Processor,
    label_names: Sequence[str] | None,
    workers: Workers = ALONE,
) -> tuple[PreTrainedModel, list[str]]:
    """The frozen base model, and the names of its modules that the files held no weights for.

    Those modules (a classification head, as a rule) start random, so they must be trained and saved with the
    adapter. Their random start is decided by `config.seed`.

    The model is on `device()`. If it is to be sharded, it is in the first worker's main memory, and has no weights
    at all on the others.

    Raises:
        UserError: there is no such model, it does not fit the task, or a package that it needs is missing.
        MachineError: it cannot be read now.
    """
    if workers.sharded and config.whole_only is not None:
        raise UserError(config.whole_only)
    torch.manual_seed(config.seed)
    arguments = _base_arguments(config, label_names)
    fresh: list[str] = []
    with naming_the_model(config):
        if workers.sharded and not workers.is_first:
            model = _without_weights(config, arguments)
        else:
            model, fresh = _with_weights(config, arguments, workers)
    fresh = workers.gather(fresh)[0] if workers.sharded else fresh
    _check_kernel(model, config)
    _check_positions(model, config)
    _pad_as(model, tokenizer)
    keep_statistics(model)
    for name in beside_heads(fresh, config):
        keep_fp32(model.get_submodule(name), amid=True)
    for name in heads_of(model, config):
        keep_fp32(model.get_submodule(name), amid=False)
    reread(model, config, [*fresh, *heads_of(model, config)])
    if TASK_FACTS[config.task].reads_images:
        round_images(model, dtype_of(config), but=heads_of(model, config))
    return model, fresh


def load_shape(config: TrialConfig, label_names: Sequence[str] | None, here: bool = True) -> PreTrainedModel:
    """As `load_base`, but without any weights: its modules show what a trial would refuse.

    Args:
        config: the settings.
        label_names: names by label index; None where the task has no labels.
        here: whether trials run on this machine. What another one has of packages and GPUs is not known.
    """
    if here and config.quantization is not None:
        _quantization(config)
    asked = config if here else config.model_copy(update={"attn_implementation": None})
    with naming_the_model(config):
        model = _without_weights(config, _base_arguments(asked, label_names))
    _check_kernel(model, config)
    _check_positions(model, config)
    return model


def load_stand_in(
    config: TrialConfig, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str] | None
) -> PreTrainedModel:
    """As `load_base`, but with random weights, float32 and plain attention: what it does with a row is the model's."""
    config = plain(config)
    torch.manual_seed(config.seed)
    with naming_the_model(config):
        model = _without_weights(config, _base_arguments(config, label_names), device())
    _pad_as(model, tokenizer)
    return model.eval()


def plain(config: TrialConfig) -> TrialConfig:
    """`config` for a stand-in: what it computes is not rounded as a trial's."""
    return config.model_copy(update={"precision": "fp32", "quantization": None, "attn_implementation": None})


def _base_arguments(config: TrialConfig, label_names: Sequence[str] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"dtype": dtype_of(config), **hub_arguments(config)}
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = _kernel(config)
    return arguments | TASKS[config.task].model_arguments(None if label_names is None else tuple(label_names))


def _kernel(config: TrialConfig) -> str:
    """The settings' attention kernel, by a name that transformers knows. UserError if it cannot be used here."""
    kernel = str(config.attn_implementation)
    if (needed := varlen.missing(kernel, dtype_of(config))) is not None:
        raise UserError(f"attn_implementation: {kernel} needs {needed}")
    varlen.register()
    return kernel


def _check_kernel(model: Any, config: TrialConfig) -> None:
    """UserError unless `model` computes attention by kernels that can be chosen, if one is."""
    kernel = config.attn_implementation or ""
    if kernel == varlen.VARLEN:
        able = model._supports_sdpa and model._supports_attention_backend
    else:
        able = model._supports_flash_attn or not varlen.needs_no_padding(kernel)
    if not able:
        raise UserError(f"attn_implementation: {type(model).__name__} cannot compute its attention by {kernel}")


def _check_positions(model: PreTrainedModel, config: TrialConfig) -> None:
    if TASK_FACTS[config.task].reads_images:  # max_length is of texts
        return
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in _positions_behind_padding(model):
        if name.endswith("position_embeddings"):
            positions = module.weight.shape[0] - module.padding_idx - 1
    check_positions(positions, config, TASKS[config.task].continues)


def _positions_behind_padding(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that count positions from behind the padding token's id on, as RoBERTa's does."""
    for name, module in model.named_modules():
        if "position" in name.rpartition(".")[2] and getattr(module, "padding_idx", None) is not None:
            yield name, module


def _pad_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell `model` what rows are padded with: many a classifier reads a row at its last token that is not padding.

    The tokenizer decides, for it is what pads; the model's config may be of another one. Where positions begin behind
    the padding's id, it stays as it is: a model that is loaded with another one counts them otherwise.
    """
    if not reads_tokens(model):
        return
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None or not any(_positions_behind_padding(model)):
        text_config.pad_token_id = tokenizer.pad_token_id


def _with_weights(
    config: TrialConfig, arguments: dict[str, Any], workers: Workers
) -> tuple[PreTrainedModel, list[str]]:
    """The model from its files, each weight straight to where it computes; and its modules that have none there."""
    if config.quantization is not None:
        arguments = {**arguments, "quantization_config": _quantization(config)}
    if not workers.sharded:
        arguments = {**arguments, "device_map": {"": device()}}
    arguments = {**arguments, "output_loading_info": True, "use_safetensors": True}
    # A head for other labels gives way to a new one, and nothing else does.
    arguments["ignore_mismatched_sizes"] = bool(TASKS[config.task].heads)
    # Without it a model is given one that its config.json makes up, which may know fewer ends of a text.
    generation = ("generation_config.json",) if TASK_FACTS[config.task].generates else ()
    model, loading = from_pretrained(AUTO_CLASS[config.task], config, arguments, *generation)
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
    replaced = [name for name, *_ in loading["mismatched_keys"]]
    _check_replaced(model, replaced)
    return model, _modules(model, [*loading["missing_keys"], *replaced])


def _without_weights(config: TrialConfig, arguments: dict[str, Any], place: torch.device = NOWHERE) -> PreTrainedModel:
    """The same model without its files: with empty parameters as a rule, else with random ones at a `place`."""
    dtype, attention = arguments.pop("dtype"), arguments.pop("attn_implementation", None)
    model_config = from_pretrained(AutoConfig, config, arguments)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model_class, revision = AUTO_CLASS[config.task], config.model_revision
    code = getattr(model_config, "auto_map", {}).get(model_class.__name__)
    if code is not None and config.trust_remote_code:
        # Registered, as from_config would do itself; but then it would take no revision of the code a second time.
        found = partial(get_class_from_dynamic_module, code, source(config), revision=revision, code_revision=revision)
        remote = here_first(config, found)
        model_class.register(type(model_config), remote, exist_ok=True)
    with place:
        return model_class.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code, **chosen)


def _quantization(config: TrialConfig) -> BitsAndBytesConfig:
    """How bitsandbytes holds the frozen weights. UserError if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization: needs the package bitsandbytes: pip install 'bilora-ray[quantization]'")
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(config),
    )


def _modules(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """The modules that own the parameters in `missing`."""
    known = {name for name, _ in model.named_parameters()}
    return sorted({name.rpartition(".")[0] for name in missing if name in known})


def _check_replaced(model: PreTrainedModel, replaced: Sequence[str]) -> None:
    """ValueError unless each of the parameters `replaced`, which the files hold in another shape, is of the labels."""
    labels = getattr(model.config, "num_labels", None)
    wrong = [name for name in replaced if model.get_parameter(name).shape[0] != labels]
    if wrong:
        raise ValueError(f"its files hold {', '.join(wrong)} in another shape than config.json says")


def heads_of(model: PreTrainedModel, config: TrialConfig) -> list[str]:
    """The heads of the task that `model` has."""
    return [name for name in TASKS[config.task].heads if hasattr(model, name)]


def beside_heads(modules: Sequence[str], config: TrialConfig) -> list[str]:
    """`modules` less the heads that PEFT trains and saves by itself."""
    return [name for name in modules if name.split(".")[0] not in TASKS[config.task].heads]
