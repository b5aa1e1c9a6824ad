"""Logits of those positions only that are to predict something: a head is wide, and most positions predict nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a batch says of its targets: each one's position, counted over all rows, and its token; both (targets,).
POSITIONS, TARGETS = "target_positions", "targets"
# What models that add something to the cross-entropy of their targets call it: the balance of routers (and of
# their logits), and ProphetNet's tokens after the next.
ADDITIONS = ("output_router_logits", "z_loss_coefficient", "ngram")


def with_targets(batch: dict[str, Tensor], shift: int) -> dict[str, Tensor]:
    """`batch` with its targets: known before it is on a GPU, which need not be asked for them.

    Args:
        batch: with `labels` (rows, length), IGNORED where nothing is learned.
        shift: by how many positions a prediction is before its label.
    """
    labels = batch["labels"]
    learned = labels != IGNORED
    learned[:, :shift] = False
    found = learned.flatten().nonzero().flatten()
    return {**batch, POSITIONS: found - shift, TARGETS: labels.flatten()[found]}


def without_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`batch` as a model takes it."""
    return {key: tensor for key, tensor in batch.items() if key not in (POSITIONS, TARGETS)}


def base_of(model: Any) -> Any:
    """transformers' own model in a `model` that may be around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_plain(model: Any) -> bool:
    """Whether a decoder's loss is the cross-entropy of its targets and nothing else, whatever positions have logits.

    That is known of transformers' own classes; of a model's own code nothing is.
    """
    base = base_of(model)
    kind: Any = type(base)
    return _is_plain_decoder(kind) and not any(getattr(base.config, key, None) for key in ADDITIONS)


def takes(model: Any, argument: str) -> bool:
    """Whether transformers' own model in `model` names an `argument` of its forward pass."""
    kind: Any = type(base_of(model))
    return _takes(kind, argument)


def without_cache(model: Any) -> dict[str, bool]:
    """What tells `model` not to keep keys and values of all layers, from which no text is written on."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def decoder_inputs(model: Any) -> Callable[[Tensor], Tensor] | None:
    """What makes a decoder's input of its labels (rows, length), if that is known, and `is_plain` of such a model."""
    base = base_of(model)
    if not _is_own(type(base)) or any(getattr(base.config, key, None) for key in ADDITIONS):
        return None
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return lambda labels: base.prepare_decoder_input_ids_from_labels(labels=labels)
    shift = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
    start, padding = (getattr(base.config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    if shift is None or start is None:
        return None
    return lambda labels: shift(labels, padding, start)


def target_logits(model: Any, inputs: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    """Logits of the targets of `batch`, (targets, vocabulary), in the order of its positions.

    What reaches the head is selected, if it is that of all positions; else what comes out is.

    Args:
        model: any that computes them, with adapters or without.
        inputs: what it is called with; no labels.
        batch: see `with_targets`.
    """
    positions = batch[POSITIONS]
    with _selecting(base_of(model).get_output_embeddings(), positions, batch["labels"].numel()) as selected:
        logits: Tensor = model(**inputs).logits
    logits = logits.flatten(0, -2)
    return logits if selected else logits.index_select(0, positions)


def mean_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss over the targets of `batch`, in nats; scalar, float32 whatever the `logits` are.

    On a CPU it is that of `cross_entropy` over all positions to the last bit: each target is added at its place.
    """
    from torch.nn import functional

    positions, size = batch[POSITIONS], batch["labels"].numel()
    found = logits.float().log_softmax(-1).gather(-1, batch[TARGETS].unsqueeze(-1))
    placed = found.new_zeros(size, 1).index_copy(0, positions, found)
    counted = positions.new_full((size,), IGNORED).index_fill(0, positions, 0)
    return functional.nll_loss(placed, counted, ignore_index=IGNORED)


@contextmanager
def _selecting(head: nn.Module | None, positions: Tensor, size: int) -> Iterator[list[bool]]:
    """Have `head` see the `positions` of the `size` that there are. What is yielded is not empty once it did."""
    selected: list[bool] = []

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = inputs
        if states.is_floating_point() and states.shape[:-1].numel() == size:
            selected.append(True)
            states = states.flatten(0, -2).index_select(0, positions).unsqueeze(0)
        return (states, *others)

    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        if hook is not None:
            hook.remove()


@cache
def _is_plain_decoder(kind: Any) -> bool:
    """Whether models of a `kind` leave their loss to transformers, and let a caller choose what has logits."""
    own = "loss_function" in inspect.unwrap(kind.forward).__code__.co_names
    return _is_own(kind) and own and _takes(kind, "logits_to_keep")


@cache
def _takes(kind: Any, argument: str) -> bool:
    return argument in inspect.signature(inspect.unwrap(kind.forward)).parameters


def _is_own(kind: Any) -> bool:
    return kind.__module__.startswith("transformers.")
