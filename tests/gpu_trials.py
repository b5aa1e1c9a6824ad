"""Trials for the tests of a GPU. Nothing here wants more than torch, transformers, PEFT and pydantic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bilora_ray import builtin
from bilora_ray.config import TrialConfig

METHODS = ("lora", "bilora")


def quickstart(**settings: Any) -> TrialConfig:
    """Settings of a trial of the built-in model, of a second or two, with `settings` on top."""
    defaults: dict[str, Any] = {
        "model_name_or_path": "builtin:quickstart/model",
        "task": "causal-lm",
        "train_data": "builtin:quickstart/train.jsonl",
        "validation_data": "builtin:quickstart/validation.jsonl",
        "max_length": 96,
        "precision": "fp32",
        "learning_rate": 4e-3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 200,
        "max_steps": 12,
        "eval_steps": 4,
    }
    return TrialConfig(**defaults | settings)


def random_llama(folder: Path, hidden_size: int, layers: int) -> str:
    """The path of a Llama of random weights that reads with the built-in model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shipped = builtin.path("quickstart/model")
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    # Frozen random weights have to be large for a low-rank change to turn them into a model of anything.
    config = AutoConfig.from_pretrained(shipped, **shape, max_position_embeddings=1024, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped).save_pretrained(folder)
    return str(folder)


def long_rows(path: Path, count: int) -> str:
    """The path of a file of `count` rows that are all longer than a thousand tokens."""
    row = json.dumps({"prompt": "12 + 21 = " * 150, "completion": "33 " * 150})
    path.write_text(f"{row}\n" * count)
    return str(path)
