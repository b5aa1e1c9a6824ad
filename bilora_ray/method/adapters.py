"""The two adapters on one PEFT model: attach the auxiliary, reach it, detach it, export the primary.

The primary is PEFT's adapter "default"; the auxiliary is a second adapter that is never active. Its perturbation is
part of the forward pass in training mode only (`layers`), so what is evaluated, generated, merged or exported is
W0 + s1 B1 A1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bilora_ray.method.layers import (
    AUXILIARY,
    PRIMARY,
    FusedLayer,
    PerturbedLayer,
    change_of,
    gains_by_fusing,
    mixed,
    plain_class_of,
    with_start,
)
from bilora_ray.method.noise import NoisyLayer
from bilora_ray.method.radius import Factors

# Layers whose weight change is not the single product B A that the radius is measured on.
UNSUPPORTED = (
    lora_layers.Embedding,
    lora_layers.Conv1d,
    lora_layers.Conv2d,
    lora_layers.Conv3d,
    lora_layers.MultiheadAttention,
    lora_layers.ParamWrapper,
    LoraParallelLinear,
    TrainableTokensWrapper,
)


def attach_auxiliary(model: PeftModel, rank: int) -> None:
    """Add the auxiliary adapter to every layer that has the primary: A2 random as PEFT starts it, B2 = 0.

    Its scaling alpha2 / r2 is the primary's nominal lora_alpha / r. Its factors are fp32 whatever the base is (fp64
    on an fp64 base): bf16 factors would overshoot the radius. The random start comes from torch's global generator.

    Args:
        model: a LoRA model with the one adapter "default".
        rank: r2, >= 1.

    Raises:
        ValueError: the model is not such a one, already has an auxiliary, is merged, or adapts modules other than
            linear layers; the message names them.
    """
    _check_attachable(model, rank)
    layers = list(_adapted(model))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The subclasses for classifiers give every adapter a copy of the head; the base class doesn't.
    PeftModel.add_adapter(model, AUXILIARY, _auxiliary_config(model, [name for name, _ in layers], rank))
    for parameter in trainable:
        parameter.requires_grad_(True)
    for _, layer in layers:
        layer.set_requires_grad(AUXILIARY)
        layer.__class__ = mixed(PerturbedLayer, plain_class_of(layer))


def detach_auxiliary(model: PeftModel) -> None:
    """Remove the auxiliary: the model is again the plain LoRA model that it was. ValueError if it has none."""
    layers = _perturbed_layers(model)
    for layer in layers.values():
        layer.__class__ = layer.plain_class  # type: ignore[assignment] # mypy sees the mixin only
    model.delete_adapter(AUXILIARY)


def fuse(model: PeftModel) -> PeftModel:
    """Have the layers of a model with the primary alone compute as Bi-LoRA's do, in place; others stay PEFT's own.

    With an fp32 base it computes what PEFT does, to the bit where alpha / r is a power of two.
    """
    for _, layer in _adapted(model):
        if gains_by_fusing(layer):
            layer.__class__ = mixed(FusedLayer, type(layer))
    return model


def accept_noise(model: PeftModel) -> list[NoisyLayer]:
    """Have the layers of a model with the primary alone compute with noise on W0, where they are given some.

    Returns:
        All adapted layers, in the model's order.

    Raises:
        ValueError: one is not plain LoRA over a linear layer whose weight is there as numbers; the message names them.
    """
    layers = dict(_adapted(model))
    others = [name for name, layer in layers.items() if not _takes_noise(layer)]
    others += [name for name, module in model.get_base_model().named_modules() if isinstance(module, UNSUPPORTED)]
    if others:
        raise ValueError(
            f"noise is added to unquantised, plain linear layers with plain LoRA, not to {_listed(others)}"
        )
    for layer in layers.values():
        layer.__class__ = mixed(NoisyLayer, plain_class_of(layer))
    return cast(list[NoisyLayer], list(layers.values()))


def has_auxiliary(model: nn.Module) -> bool:
    """Whether an auxiliary is attached."""
    return any(isinstance(module, PerturbedLayer) for module in model.modules())


def auxiliary_factors(model: nn.Module) -> list[Factors]:
    """(A2, B2, s2) of every adapted layer, in the model's order. ValueError if there is no auxiliary."""
    return [layer.factors(AUXILIARY) for layer in _perturbed_layers(model).values()]


def auxiliary_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The auxiliary's A2 and B2 by name, each layer's A2 before its B2; empty if there is none."""
    return {
        f"{name}.{factor}.{AUXILIARY}.weight": getattr(layer, factor)[AUXILIARY].weight
        for name, layer in model.named_modules()
        if isinstance(layer, PerturbedLayer)
        for factor in ("lora_A", "lora_B")
    }


def primary_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All else that is trained, by name: the primary's factors and whatever PEFT trains beside them, such as a head."""
    auxiliary = auxiliary_parameters(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in auxiliary}


def primary_factors(model: PeftModel) -> list[Factors]:
    """(A1, B1, s1) of every adapted linear layer, in the model's order. ValueError if there is none."""
    found = []
    for _, layer in _adapted(model):
        if PRIMARY not in layer.lora_A:
            continue
        A, B = layer.lora_A[PRIMARY].weight, layer.lora_B[PRIMARY].weight
        found.append(Factors(cast(Tensor, A), cast(Tensor, B), layer.scaling[PRIMARY]))
    if not found:
        raise ValueError("the primary adapts no linear layer")
    return found


def of_one_gradient(model: PeftModel) -> list[bool]:
    """Of every adapted layer whether both adapters' gradients are G A^T and B^T G of one G, in the model's order.

    Dropout gives the primary other inputs than the auxiliary; a variant such as DoRA scales what it makes of them.
    """
    return [
        isinstance(layer.lora_dropout[PRIMARY], nn.Identity) and PRIMARY not in layer.lora_variant
        for _, layer in _adapted(model)
    ]


def export_primary(model: PeftModel, folder: str | PathLike[str], weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the primary as the ordinary PEFT adapter that plain LoRA would write; training may go on undisturbed.

    One with a start (PiSSA, LoRA-GA) is written as plain LoRA of twice the rank, for the base as it is.

    Embeddings are in it where the adapter is on them, as PEFT has it, or where they are in `modules_to_save`; that is
    where a vocabulary that has grown belongs, since nobody is asked for its size before.

    Args:
        model: with or without an auxiliary.
        folder: gets adapter_config.json and adapter_model.safetensors.
        weights: name -> tensor of all that is trained, where the model's own parameters are only parts of them (FSDP).

    Raises:
        ValueError: an adapter is merged into the base weights.
    """
    merged = [name for name, layer in _adapted(model) if layer.merged]
    if merged:
        raise ValueError(f"unmerge the adapter before exporting it; it is merged into {_listed(merged)}")
    # PEFT would ask the Hub's newest commit, each time, whether the vocabulary has grown since.
    embeddings = _adapts_embeddings(model)
    weights = weights if not with_start(model) else as_plain_lora(model)
    # PEFT's signature takes what it hands on, `state_dict` among it.
    model.save_pretrained(
        str(folder), selected_adapters=[PRIMARY], save_embedding_layers=embeddings, state_dict=weights
    )
    if with_start(model):
        config = LoraConfig.from_pretrained(str(folder))
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        config.save_pretrained(str(folder))


def as_plain_lora(model: nn.Module) -> dict[str, Tensor]:
    """All else that is trained than the auxiliary, by name; of a primary with a start LoRA of twice the rank."""
    weights = {name: parameter.detach() for name, parameter in primary_parameters(model).items()}
    for name, layer in with_start(model).items():
        A, B, _ = change_of(layer)
        weights[f"{name}.lora_A.{PRIMARY}.weight"] = A.detach()
        weights[f"{name}.lora_B.{PRIMARY}.weight"] = B.detach()
    return weights


def _adapted(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Every layer with the primary, with its name in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and PRIMARY in module.r:
            yield name, module


def _takes_noise(layer: LoraLayer) -> bool:
    """Whether `layer` computes W0 x + s1 B1 A1 x and nothing else, with a W0 that can be added to."""
    is_plain = plain_class_of(layer) is lora_layers.Linear and type(layer.base_layer) in (nn.Linear, Conv1D)
    return is_plain and PRIMARY not in layer.lora_variant and not layer.lora_bias[PRIMARY] and not layer.merged


def _adapts_embeddings(model: PeftModel) -> bool:
    if getattr(model.peft_config[PRIMARY], "trainable_token_indices", None) is not None:
        return False
    return any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name, _ in _adapted(model))


def _perturbed_layers(model: nn.Module) -> dict[str, PerturbedLayer]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PerturbedLayer)}
    if not layers:
        raise ValueError("the model has no auxiliary adapter; attach_auxiliary(model, rank) adds it")
    return layers


def _auxiliary_config(model: PeftModel, names: list[str], rank: int) -> LoraConfig:
    """Plain LoRA on exactly the primary's layers: no DoRA, dropout, bias, patterns or other variant carries over."""
    primary = cast(LoraConfig, model.peft_config[PRIMARY])
    return LoraConfig(
        task_type=primary.task_type,
        base_model_name_or_path=primary.base_model_name_or_path,
        r=rank,
        lora_alpha=rank * primary.lora_alpha / primary.r,  # type: ignore[arg-type] # PEFT only divides it by r
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=primary.fan_in_fan_out,
    )


def _check_attachable(model: PeftModel, rank: int) -> None:
    if rank < 1:
        raise ValueError(f"the auxiliary's rank must be >= 1, got {rank}")
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, LoraModel):
        raise ValueError(f"the auxiliary needs a PEFT LoRA model, not {type(model).__name__}")
    if AUXILIARY in model.peft_config:
        raise ValueError("the model already has an auxiliary adapter")
    if list(model.peft_config) != [PRIMARY]:
        raise ValueError(f"the model must have the one adapter '{PRIMARY}', not {list(model.peft_config)}")
    unsupported = [name for name, module in model.get_base_model().named_modules() if isinstance(module, UNSUPPORTED)]
    if unsupported:
        raise ValueError(f"the auxiliary perturbs linear layers only, not {_listed(unsupported)}")
    layers = dict(_adapted(model))
    if not layers:
        raise ValueError("the primary adapts no linear layer")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"unmerge the primary first; it is merged into {_listed(merged)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
