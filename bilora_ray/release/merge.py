"""An adapter's weights in those of its base model."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


def tied_targets(model: PeftModel) -> dict[str, list[nn.Module]]:
    """Adapted modules whose weight is another module's too, as an output layer's is the embeddings': who has it."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users.setdefault(id(weight), []).append(module)
    found = {}
    for name, module in model.named_modules():
        own = getattr(module.get_base_layer(), "weight", None) if isinstance(module, LoraLayer) else None
        if own is not None and len(users[id(own)]) > 1:  # experts have weights of other names
            found[name.rpartition(".")[2]] = users[id(own)]
    return found


def merged(model: PeftModel) -> PreTrainedModel:
    """The base model of `model` with its adapter in the weights.

    A tied weight that is adapted in one place becomes one of each place: the adapter changes it there alone.
    """
    for _, *others in tied_targets(model).values():
        for module in others:
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload()
