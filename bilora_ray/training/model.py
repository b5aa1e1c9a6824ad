"""The base model with its primary adapter, and the tokenizer, as a trial's settings name them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError, safe_open
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
from transformers.pytorch_utils import Conv1D

from bilora_ray.config import TrialConfig
from bilora_ray.errors import SAME_AGAIN, UserError, comes_again, first_line, is_of_device, refusal
from bilora_ray.measures import TASK_FACTS
from bilora_ray.method import MethodAdamW, build_method, fuse, primary_parameters, settings_of
from bilora_ray.method.base import Place
from bilora_ray.method.primaries import DIRECTIONS, await_start, starts, with_exact_magnitudes
from bilora_ray.method.registry import stay
from bilora_ray.paths import is_cached, kind_of, loadable
from bilora_ray.recipe import is_whole
from bilora_ray.training.compute import varlen
from bilora_ray.training.compute.bases import Base, key_of, take
from bilora_ray.training.compute.precision import dtype_of
from bilora_ray.training.data.chat import use_template
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.probe.passes import reads_tokens
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Model, Processor, check_positions

T = TypeVar("T")

AUTO_CLASS: dict[str, Any] = {task: getattr(transformers, facts.model_class) for task, facts in TASK_FACTS.items()}
# On some CPUs bitsandbytes packs 4-bit weights for an evaluation, and unpacks them for training to others than before.
PACKS = "support_avx512bf16_for_cpu"
NOWHERE = torch.device("meta")
# What models call the parts that look back at a text.
ATTENTION = re.compile(r"att(entio)?n\w*\.", re.IGNORECASE)


def device() -> torch.device:
    """Where a trial computes: the GPU that this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(config: TrialConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token. UserError if there is none that can be read."""
    with _naming_the_model(config):
        tokenizer = _from_pretrained(AutoTokenizer, config, _hub_arguments(config))
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
    with _naming_the_model(config):
        return _from_pretrained(AutoImageProcessor, config, {**_hub_arguments(config), "backend": "pil"})


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
    with _naming_the_model(config):
        if workers.sharded and not workers.is_first:
            model = _without_weights(config, arguments)
        else:
            model, fresh = _with_weights(config, arguments, workers)
    fresh = workers.gather(fresh)[0] if workers.sharded else fresh
    _check_kernel(model, config)
    _check_positions(model, config)
    _pad_as(model, tokenizer)
    _keep_statistics(model)
    for name in _beside_heads(fresh, config):
        _keep_fp32(model.get_submodule(name), amid=True)
    for name in _heads(model, config):
        _keep_fp32(model.get_submodule(name), amid=False)
    _reread(model, config, [*fresh, *_heads(model, config)])
    if TASK_FACTS[config.task].reads_images:
        _round_images(model, dtype_of(config), but=_heads(model, config))
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
    with _naming_the_model(config):
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
    with _naming_the_model(config):
        model = _without_weights(config, _base_arguments(config, label_names), device())
    _pad_as(model, tokenizer)
    return model.eval()


def plain(config: TrialConfig) -> TrialConfig:
    """`config` for a stand-in: what it computes is not rounded as a trial's."""
    return config.model_copy(update={"precision": "fp32", "quantization": None, "attn_implementation": None})


def _base_arguments(config: TrialConfig, label_names: Sequence[str] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"dtype": dtype_of(config), **_hub_arguments(config)}
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
    model, loading = _from_pretrained(AUTO_CLASS[config.task], config, arguments, *generation)
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
    replaced = [name for name, *_ in loading["mismatched_keys"]]
    _check_replaced(model, replaced)
    return model, _modules(model, [*loading["missing_keys"], *replaced])


def _without_weights(config: TrialConfig, arguments: dict[str, Any], place: torch.device = NOWHERE) -> PreTrainedModel:
    """The same model without its files: with empty parameters as a rule, else with random ones at a `place`."""
    dtype, attention = arguments.pop("dtype"), arguments.pop("attn_implementation", None)
    model_config = _from_pretrained(AutoConfig, config, arguments)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model_class, revision = AUTO_CLASS[config.task], config.model_revision
    code = getattr(model_config, "auto_map", {}).get(model_class.__name__)
    if code is not None and config.trust_remote_code:
        # Registered, as from_config would do itself; but then it would take no revision of the code a second time.
        found = partial(get_class_from_dynamic_module, code, source(config), revision=revision, code_revision=revision)
        remote = _here_first(config, found)
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
    known = [] if task.peft_type == "SEQ_CLS" else _heads(model, config)
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
    inside = [name.removesuffix(".base_layer") for name in _beside_heads(linear, config) if ".lora_" not in name]
    attention = [name for name in inside if ATTENTION.search(name)]
    others = {name.rpartition(".")[2] for name in attention or inside if "." in name}
    others = {name for name in others if f"'{name}'" not in problem}
    return f"{line}; what can have one: target_modules: [{', '.join(sorted(others))}]" if others else line


def enable_gradient_checkpointing(model: Model) -> None:
    """Recompute activations in the backward pass. The frozen embeddings must pass a gradient on for that."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if isinstance(model, PeftModel):
        model.enable_input_require_grads()


def source(config: TrialConfig) -> str:
    """What `from_pretrained` takes for `model_name_or_path`."""
    return loadable(config.model_name_or_path)


def _from_pretrained(kind: Any, config: TrialConfig, arguments: dict[str, Any], *optional: str) -> Any:
    """`kind.from_pretrained` of the settings' model; `optional` as in `is_cached`."""
    return _here_first(config, partial(kind.from_pretrained, source(config), **arguments), *optional)


def _here_first(config: TrialConfig, read: Callable[..., T], *optional: str) -> T:
    """What `read` gives. transformers would ask the Hub even of a commit that is here."""
    reads_images = TASK_FACTS[config.task].reads_images
    if is_cached(config.model_name_or_path, config.model_revision, *optional, reads_images=reads_images):
        with suppress(OSError, ValueError):  # something is missing after all
            return read(local_files_only=True)
    return read()


def _hub_arguments(config: TrialConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.model_revision is not None:
        arguments["revision"] = config.model_revision
    return arguments


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


def _saved_whole(model: PreTrainedModel, fresh: Sequence[str], config: TrialConfig) -> list[str]:
    """The modules that are trained and saved beside the adapter, less those that PEFT adds by itself."""
    heads = _heads(model, config) if TASKS[config.task].peft_type is None else []
    return heads + _beside_heads(fresh, config)


def _heads(model: PreTrainedModel, config: TrialConfig) -> list[str]:
    return [name for name in TASKS[config.task].heads if hasattr(model, name)]


def _beside_heads(modules: Sequence[str], config: TrialConfig) -> list[str]:
    """`modules` less the heads that PEFT trains and saves by itself."""
    return [name for name in modules if name.split(".")[0] not in TASKS[config.task].heads]


@contextmanager
def _naming_the_model(config: TrialConfig) -> Iterator[None]:
    """Turns what a wrong model, a missing package or a failing disk raises into one line that names the setting."""
    name = config.model_name_or_path
    if kind_of(name, is_data=False) == "local" and not Path(name).is_dir():
        named = "" if Path(name).is_absolute() else "; it is named from the current folder, as an export does"
        raise UserError(f"model_name_or_path: no such folder: {name}{named}")
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(_missing(error, config)) from error
    except Exception as error:  # of which type depends on the library, and on the model's own code
        if is_of_device(error):
            raise
        if "Unrecognized configuration class" in str(error):  # the class's name would follow, and all that are known
            raise UserError(f"task: '{name}' is no model for {config.task}") from error
        raise refusal(f"model_name_or_path: cannot load '{name}' ({first_line(error)})", error) from error


def _missing(error: ImportError, config: TrialConfig) -> str:
    """What `error` misses, and which setting asks for that."""
    name, attention, reason = config.model_name_or_path, config.attn_implementation, first_line(error)
    if "FlashAttention" in reason:
        if importlib.util.find_spec("flash_attn") is None:
            return f"attn_implementation: {attention} needs the package flash-attn: pip install flash-attn"
        return f"attn_implementation: {attention} cannot be used here ({reason})"
    if config.trust_remote_code:
        return f"trust_remote_code: the code of '{name}' cannot be imported ({reason})"
    return f"model_name_or_path: '{name}' needs a package that is not here ({reason})"


def _reread(model: PreTrainedModel, config: TrialConfig, modules: Sequence[str]) -> None:
    """Give the `modules`, which compute in fp32, the weights of a model that was trained here as its files have them.

    transformers has rounded those of all modules to one dtype.
    """
    folder = Path(source(config))
    if dtype_of(config) == torch.float32 or not folder.is_dir() or not is_whole(folder):
        return
    prefixes = tuple(f"{name}." for name in modules)
    parameters = {name: one for name, one in model.named_parameters() if name.startswith(prefixes)}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for name in parameters.keys() & set(tensors.keys()):
                parameters[name].copy_(tensors.get_tensor(name))


def _has_linear(model: nn.Module, but: Sequence[str]) -> bool:
    """Whether an adapter can be on a layer of `model` that is in none of the modules `but`."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return any(not f"{name}.".startswith(tuple(f"{whole}." for whole in but)) for name in layers)


def _round_images(model: nn.Module, dtype: torch.dtype, but: Sequence[str]) -> None:
    """Have the parts of `model`, less the modules `but`, read images as `dtype`: some would refuse float32."""

    def rounded(value: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(rounded, inputs)), {key: rounded(value) for key, value in named.items()}

    for name, part in model.named_children():
        if name not in but:
            part.register_forward_pre_hook(enter, with_kwargs=True)


def _keep_statistics(model: nn.Module) -> None:
    """Have batch normalisation use the base's statistics in training too: an adapter does not hold those of its own."""

    def freeze(module: nn.Module, _: tuple[Any, ...]) -> None:
        module.eval()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.register_forward_pre_hook(freeze)


def _keep_fp32(module: nn.Module, amid: bool) -> None:
    """Have `module`, which is trained, compute in fp32 beside others that don't: in bf16 AdamW's moments would stall.

    Args:
        module: it.
        amid: whether others read what it computes. What a head does, the loss reads, in fp32.
    """
    outer = next(module.parameters()).dtype

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    def leave(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(outer) if torch.is_tensor(output) else output

    if outer != torch.float32:
        module.float()
        module.register_forward_pre_hook(enter)
        if amid:
            module.register_forward_hook(leave)
