"""Bi-LoRA (arXiv 2508.19564) on a PEFT model, for any torch loop or the HF Trainer. Needs torch and PEFT only."""

from bilora_ray.method.adapters import (
    attach_auxiliary,
    auxiliary_factors,
    auxiliary_parameters,
    detach_auxiliary,
    export_primary,
    has_auxiliary,
    primary_parameters,
)
from bilora_ray.method.base import MethodAdamW, MethodSettings
from bilora_ray.method.bilora import BiLoraAdamW
from bilora_ray.method.lora import LoraAdamW
from bilora_ray.method.radius import Factors, perturbation_norm, project_
from bilora_ray.method.registry import METHODS, build_method

__all__ = [
    "METHODS",
    "BiLoraAdamW",
    "Factors",
    "LoraAdamW",
    "MethodAdamW",
    "MethodSettings",
    "attach_auxiliary",
    "auxiliary_factors",
    "auxiliary_parameters",
    "build_method",
    "detach_auxiliary",
    "export_primary",
    "has_auxiliary",
    "perturbation_norm",
    "primary_parameters",
    "project_",
]
