"""Bi-LoRA (arXiv 2508.19564) on a PEFT model, for any torch loop or the HF Trainer. Needs torch and PEFT only.

Sharpness-aware minimization (SAM) of LoRA adapters in one forward and one backward pass a step: `attach_auxiliary` adds
the adversarial weight perturbation to a model as a second adapter, `BiLoraAdamW` descends on the first and ascends on
the second, `export_primary` writes the first alone. `reference` is the same word for word from the paper, to be read;
examples/bilora_loop.py is a whole training loop.
"""

from bilora_ray.method.adapters import (
    attach_auxiliary,
    auxiliary_factors,
    auxiliary_parameters,
    detach_auxiliary,
    export_primary,
    fuse,
    has_auxiliary,
    primary_parameters,
)
from bilora_ray.method.base import MethodAdamW
from bilora_ray.method.bilora import BiLoraAdamW
from bilora_ray.method.lora import LoraAdamW
from bilora_ray.method.radius import Factors, perturbation_norm, project_
from bilora_ray.method.registry import METHODS, build_method, settings_of

__all__ = [
    "METHODS",
    "BiLoraAdamW",
    "Factors",
    "LoraAdamW",
    "MethodAdamW",
    "attach_auxiliary",
    "auxiliary_factors",
    "auxiliary_parameters",
    "build_method",
    "detach_auxiliary",
    "export_primary",
    "fuse",
    "has_auxiliary",
    "perturbation_norm",
    "primary_parameters",
    "project_",
    "settings_of",
]
