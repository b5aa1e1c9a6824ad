"""What a primary adapter is besides plain LoRA: the magnitudes of DoRA."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from bilora_ray.method.layers import LOW_PRECISION, PRIMARY


def with_exact_magnitudes(model: PeftModel) -> PeftModel:
    """`model`, with the magnitudes of a DoRA that has just been put on it, B = 0, as fp32 has them: no others.

    PEFT takes the norms of the weight's rows in the base's dtype, and divides by them in fp32. On a bf16 base each row
    would begin some tenths of a percent longer or shorter than it is.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and PRIMARY in module.lora_variant:
            weight = weight_in_rows(module)
            if weight.dtype in LOW_PRECISION:
                magnitude = module.lora_magnitude_vector[PRIMARY]
                magnitude.weight = nn.Parameter(torch.linalg.norm(weight.float(), dim=1))
    return model


def weight_in_rows(layer: LoraLayer) -> Tensor:
    """W0 of an adapted linear layer, m x n, a row for each output; of a quantised one as it is computed with."""
    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
