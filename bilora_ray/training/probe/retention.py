"""What a training has made its base model forget: how much worse it reads texts that are of no training."""

from __future__ import annotations

from array import array

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training import model as models
from bilora_ray.training.compute.bases import Key, key_of
from bilora_ray.training.compute.memory import release
from bilora_ray.training.evaluate import evaluate
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.rows import read_retained
from bilora_ray.training.tasks.base import Example, Model

# The loss of one base model at the most, by what decides it: a process scores many models that were trained from one.
_of_base: dict[Key, float] = {}


def forgetting(model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """`forgetting`, by how much the mean loss per token of `retention_data` has risen, and `retention_loss`, as it is.

    Of each text the first `max_length` tokens are read, with the special tokens that the tokenizer gives a text. PEFT's
    method_comparison has a measure of this name, and computes it so. Nothing where the settings name no such texts, or
    the model has no adapter.

    Args:
        model: on its device, its adapter loaded. It is left as it was.
        config: the settings.
        tokenizer: the base model's.

    Raises:
        UserError: `retention_data` is not as `read_retained` asks for, or no text of it has two tokens.
    """
    if config.retention_data is None or not isinstance(model, PeftModel):
        return {}
    texts, _ = read_retained(config)
    after = _loss(model, texts, config, tokenizer)
    with model.disable_adapter():
        before = _loss(model, texts, config, tokenizer)
    return {"forgetting": after - before, "retention_loss": after}


def forgetting_whole(model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """As `forgetting`, of a model that was trained whole. It is used up: there may be no room for its base beside it.

    Args:
        model: on its device.
        config: the settings, which name the base model that it was trained from.
        tokenizer: the base model's.

    Raises:
        UserError: as `forgetting`; or there is no such base model.
    """
    if config.retention_data is None:
        return {}
    texts, _ = read_retained(config)
    after = _loss(model, texts, config, tokenizer)
    nn.Module.to(model, torch.device("meta"))
    release()
    before = _loss_of_base(texts, config)
    release()  # the base is in a circle, and the next model may be as large
    return {"forgetting": after - before, "retention_loss": after}


def _loss_of_base(texts: list[str], config: TrialConfig) -> float:
    config = config.model_copy(update={"seed": 0})  # what a base has no weights for is the same for all trained from it
    base = key_of(config, None, None, models.device())
    key = (base, config.max_length, *texts)
    if base is not None and key in _of_base:
        return _of_base[key]
    processor = models.load_processor(config)
    loss = _loss(models.load_base(config, processor, None)[0], texts, config, processor)
    _of_base.clear()
    if base is not None:
        _of_base[key] = loss
    return loss


def _loss(model: Model, texts: list[str], config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> float:
    # The loss is all that is asked: nothing is written, and no gradient is looked at.
    plain = config.model_copy(update={"predict_with_generate": False, "sharpness_radius": None, "metric": "eval_loss"})
    return evaluate(model, _examples(texts, config, tokenizer), plain, tokenizer)["eval_loss"]


def _examples(texts: list[str], config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Each text with a label on all tokens but the first, which nothing predicts."""
    tokens = tokenizer(texts, truncation=True, max_length=config.max_length, verbose=False)["input_ids"]
    whole = [array("i", ids) for ids in tokens if len(ids) > 1]
    if not whole:
        raise UserError(f"retention_data: no text of {config.retention_data} has a token that follows another")
    return [Example(input_ids=ids, labels=array("i", [IGNORED, *ids[1:]])) for ids in whole]
