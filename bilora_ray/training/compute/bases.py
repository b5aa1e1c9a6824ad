"""The base model of a trial, kept for the next trial of the process, which loads no weights then.

A trial has its base alone: it takes it, and gives it back once it has ended between two steps. What it added comes off
by putting back what the base's modules held when it was taken, each by each; of weights that a trial should not have
touched it is looked at whether it did. A base that cannot be put back, or never came back, is loaded again.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.digests import stamp_of_base
from bilora_ray.settings import deciding
from bilora_ray.training.distributed.workers import random_states

# The settings that a base is loaded by. The seed is one of them if something in it starts random.
DECISIVE = deciding("model") - {"seed"} | {"precision", "quantization", "attn_implementation"}

Key = tuple[object, ...]


@dataclass
class Base:
    """A base model that a trial has for itself.

    Attributes:
        model: frozen, without an adapter.
        fresh: the names of its modules that the files held no weights for.
        passed: what it was found fit for; who looks at it says in which words.
        key: what decides it; None: it is not to be kept.
        seed: what decided what in it is random; None where nothing is.
    """

    model: PreTrainedModel
    fresh: Sequence[str]
    key: Key | None = None
    seed: int | None = None
    passed: set[object] = field(default_factory=set)
    _before: _Contents | None = None

    def begin(self) -> PreTrainedModel:
        """The model, to be changed by a trial from now on: as it is now, the next one gets it."""
        if self.key is not None:
            self._before = _Contents(self.model)
        return self.model

    def end(self) -> None:
        """Keep the model for the next trial, if it can be as it was. To be called between two passes only."""
        if self._before is not None and self._before.put_back():
            self._before = None
            _kept[:] = [self]


# One at the most.
_kept: list[Base] = []
_last: weakref.ref[PreTrainedModel] | None = None


def key_of(
    config: TrialConfig, label_names: Sequence[str] | None, pad_token_id: int | None, device: torch.device
) -> Key | None:
    """What decides the base model of `config`; None where that is not known.

    Nor is it of a model's own code, which may write to its weights where nobody sees it.
    """
    stamp = stamp_of_base(config)
    if stamp is None or config.trust_remote_code:
        return None
    settings = tuple((name, getattr(config, name)) for name in sorted(DECISIVE))
    return settings, stamp, None if label_names is None else tuple(label_names), pad_token_id, device


def take(key: Key | None, seed: int, read: Callable[[], tuple[PreTrainedModel, Sequence[str]]]) -> Base:
    """The base that was kept, if it is of that `key` and nothing in it is of another seed; else what `read` gives.

    Args:
        key: as `key_of` gives it; None for a base that is not to be kept.
        seed: what `read` starts torch's generators with.
        read: gives the model, and the names of its modules that start random.
    """
    global _last
    found = _kept.pop() if _kept else None
    if found is not None and key is not None and found.key == key and found.seed in (None, seed):
        return found
    del found  # before there is another: it may be large
    if _last is not None and _last() is not None:
        gc.collect()  # what a trial leaves is in circles
        torch.cuda.empty_cache()
    torch.manual_seed(seed)
    before = random_states()
    model, fresh = read()
    drawn = any(not torch.equal(state, before[name]) for name, state in random_states().items())
    if key is not None:
        _last = weakref.ref(model)
    # An adapter that transformers found beside the weights is not of these files alone.
    alone = not getattr(model, "_hf_peft_config_loaded", False)
    return Base(model, fresh, key if alone else None, seed if drawn else None)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """What is added to `model` in the block comes off behind it. Its tensors must not be written to meanwhile."""
    before = _Contents(model)
    try:
        yield
    finally:
        assert before.put_back(), "a tensor of the model was written to"


class _Contents:
    """What a model, its modules and its configs hold: to be put back."""

    def __init__(self, model: nn.Module) -> None:
        holders = list(_holders(model))
        self._held = [(holder, type(holder), dict(vars(holder))) for holder in holders]
        containers = (value for _, _, held in self._held for value in held.values())
        self._filled = [(value, copy(value)) for value in containers if isinstance(value, dict | list | set)]
        tensors = {id(tensor): tensor for holder in holders for tensor in _tensors(holder)}
        self._tensors = [(tensor, tensor.requires_grad, _mark(tensor)) for tensor in tensors.values()]

    def put_back(self) -> bool:
        """Whether all is as it was: it is not where a tensor of the model was written to."""
        if any(_mark(tensor) != mark for tensor, _, mark in self._tensors):
            return False
        for holder, kind, held in self._held:
            holder.__class__ = kind
            vars(holder).clear()
            vars(holder).update(held)
        for container, content in self._filled:
            _fill(container, content)
        for tensor, requires_grad, _ in self._tensors:
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
                tensor.grad = None
        return True


def _holders(model: nn.Module) -> Iterator[Any]:
    """The modules of `model`, and the configs that they and one another hold."""
    seen: set[int] = set()
    waiting: list[Any] = list(model.modules())
    while waiting:
        holder = waiting.pop()
        if id(holder) not in seen:
            seen.add(id(holder))
            yield holder
            waiting += [
                value for value in vars(holder).values() if isinstance(value, PreTrainedConfig | GenerationConfig)
            ]


def _tensors(holder: Any) -> Iterator[Tensor]:
    for value in vars(holder).values():
        for inner in value.values() if isinstance(value, dict) else (value,):
            if isinstance(inner, Tensor):
                yield inner


def _mark(tensor: Tensor) -> tuple[object, ...]:
    """What becomes another when `tensor` is written to, or is given other memory."""
    return None if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape


def _fill(container: Any, content: Any) -> None:
    """Make `container` equal to `content`, whoever holds it."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
