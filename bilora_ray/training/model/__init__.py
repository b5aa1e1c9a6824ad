"""The base model with its primary adapter, and the tokenizer, as a trial's settings name them."""

from bilora_ray.training.model.adapter import (
    adapter_mb,
    add_primary,
    build_optimizer,
    enable_gradient_checkpointing,
    load_adapter,
)
from bilora_ray.training.model.base import (
    AUTO_CLASS,
    device,
    load_base,
    load_processor,
    load_shape,
    load_stand_in,
    load_tokenizer,
    plain,
    take_base,
)

__all__ = [
    "AUTO_CLASS",
    "adapter_mb",
    "add_primary",
    "build_optimizer",
    "device",
    "enable_gradient_checkpointing",
    "load_adapter",
    "load_base",
    "load_processor",
    "load_shape",
    "load_stand_in",
    "load_tokenizer",
    "plain",
    "take_base",
]
