"""Passes without padding: rows one after another in one row, where an attention kernel keeps them apart.

That takes a kernel that is told where rows end, as transformers' `DataCollatorWithFlattening` does it; positions begin
anew with each row. By `sdpa` they would be kept apart by a mask of all positions by all, slower than padding. Nor
may keys and values be cached: then transformers does not look at positions, and each row sees those before it.
"""

from __future__ import annotations

import importlib.util
import inspect
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from bilora_ray.errors import comes_again
from bilora_ray.training.compute.targets import base_of, is_plain, takes, with_targets
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

# What `attn_implementation` calls torch's own kernel.
VARLEN = "varlen"
# Where rows begin and end, in transformers' words.
ENDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Kernel -> the modules of which one must be there, and how to get it.
PACKAGES = {
    "flash_attention_2": (("flash_attn", "kernels"), "the package flash-attn: pip install flash-attn"),
    "flash_attention_3": (
        ("flash_attn_3", "flash_attn_interface", "kernels"),
        "the package kernels: pip install kernels",
    ),
    "kernels-community": (("kernels",), "the package kernels: pip install kernels"),
    VARLEN: (("torch.nn.attention.varlen",), "torch 2.10 or later"),
}
# From this compute capability on a GPU has what these kernels use.
CAPABILITY = (8, 0)
# By how much the logits of a row may differ between two layouts, as a share of their size: far less than by
# another row in sight, and more than bf16 rounds.
ROUNDING = 0.05

_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class Row(Protocol):
    """An example of causal-lm: ids, and as many labels, IGNORED where nothing is learned."""

    @property
    def input_ids(self) -> array[int]:
        """(length,)."""

    @property
    def labels(self) -> array[int]:
        """(length,)."""


class Tokens(NamedTuple):
    """A row that is made up."""

    input_ids: array[int]
    labels: array[int]


def missing(kernel: str, dtype: torch.dtype) -> str | None:
    """What a `kernel` needs that this machine, or a computation in `dtype`, has not; None: it can be used."""
    if not is_looked_for(kernel):
        return None
    if (package := missing_package(kernel)) is not None:
        return package
    import torch

    if not torch.cuda.is_available():
        return "a GPU, and none can be seen here"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or higher"
    return None if dtype in (torch.bfloat16, torch.float16) else "precision: bf16"


def is_looked_for(kernel: str) -> bool:
    """Whether a `kernel` is not everywhere, and needs a GPU."""
    return _family(kernel) in PACKAGES


def missing_package(kernel: str) -> str | None:
    """The package of a `kernel` that is looked for, with how to get it, if it is not here. It is not imported."""
    modules, package = PACKAGES[_family(kernel)]
    return None if any(_is_there(module) for module in modules) else package


def register() -> None:
    """Make `varlen` a word for transformers' models."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, mask)


def is_flat(task: Any, model: Any) -> bool:
    """Whether `model` reads the rows of a `task` of `training.tasks` as one."""
    return bool(task.continues) and flattens(model)


def batch_of(task: Any, model: Any, examples: Sequence[Any], processor: Any) -> dict[str, Any]:
    """The batch that a `task` makes of `examples` for `model`: one row, if it reads several so."""
    if is_flat(task, model):
        return flattened(examples)
    batch: dict[str, Any] = task.collate(examples, processor)
    return batch


def placed(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`batch` on a `device`; numbers stay with the CPU."""
    return {key: part if isinstance(part, int) else part.to(device, non_blocking=True) for key, part in batch.items()}


def flattened(examples: Sequence[Row]) -> dict[str, Any]:
    """`examples` of causal-lm as one row, (1, tokens), with its targets, and where each begins and ends."""
    import torch

    rows = [example.input_ids for example in examples]
    # The first token of a row is predicted from none.
    labels = [array("i", [IGNORED, *example.labels[1:]]) for example in examples]
    places = [range(len(row)) for row in rows]
    sides: dict[str, Sequence[Sequence[int]]] = {"input_ids": rows, "position_ids": places, "labels": labels}
    batch = {key: torch.tensor([[x for part in parts for x in part]]) for key, parts in sides.items()}
    lengths = [len(row) for row in rows]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {**with_targets(batch, shift=1), **dict(zip(ENDS, (ends, ends, *[max(lengths)] * 2), strict=True))}


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model is told of a `batch` beside its tokens, if that is `flattened`."""
    if ENDS[0] not in batch:
        return {}
    return {"position_ids": batch["position_ids"], "use_cache": False, **{key: batch[key] for key in ENDS}}


def flattens(model: Any) -> bool:
    """Whether `model` reads rows that are one after another as it reads each alone.

    It is tried once, if `may_flatten`: a layer that is not told where rows end would mix them in silence.
    """
    base = base_of(model)
    if base not in _known:
        kernel = str(getattr(base.config, "_attn_implementation", None))
        _known[base] = may_flatten(base, kernel) and _keeps_apart(base)
    return _known[base]


def may_flatten(base: Any, kernel: str) -> bool:
    """Whether a `kernel` is told where rows end, and a model takes positions and is known to need nothing else."""
    if kernel == VARLEN and any(_drops_attention(key, value) for key, value in base.config.to_dict().items()):
        return False
    return needs_no_padding(kernel) and is_plain(base) and takes(base, "position_ids")


def needs_no_padding(kernel: str) -> bool:
    """Whether a `kernel` can be told where rows end."""
    return kernel == VARLEN or "flash" in kernel


def _drops_attention(key: str, value: Any) -> bool:
    """Whether a setting of a model is a rate of dropout in attention, which torch's kernel has not."""
    return "att" in key and "drop" in key and isinstance(value, float) and value > 0


def _keeps_apart(base: Any) -> bool:
    import torch

    rows = [array("i", range(5, 5 + length)) for length in (7, 11)]
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            batch = flattened([Tokens(row, row) for row in rows])
            told = {"input_ids": batch["input_ids"], **inputs_of(batch)}
            told = {key: part.to(base.device) if torch.is_tensor(part) else part for key, part in told.items()}
            together = base(**told).logits[0].float()
            ids = (torch.tensor([row.tolist()], device=base.device) for row in rows)
            alone = torch.cat([base(input_ids=row).logits[0].float() for row in ids])
            return bool((together - alone).norm() <= ROUNDING * alone.norm())
    except Exception as error:  # a model's own code may raise any; what another start may mend is raised again
        if not comes_again(error):
            raise
        return False
    finally:
        base.train(was_training)


def attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: rows that are one after another by torch's kernel, padded ones by `sdpa`.

    Args:
        module: the layer.
        query: (rows, heads, length, size).
        key: (rows, heads or fewer of them, length, size).
        value: the same, or smaller in size.
        attention_mask: of padded rows.
        dropout: of attention, which the kernel has not.
        scaling: of the scores; None: 1 / sqrt(size).
        sliding_window: so many tokens back a token sees, itself among them.
        cu_seq_lens_q: (rows + 1,), int32: where each begins in the one row that there is; None: rows are padded.
        max_length_q: tokens of the longest.
        others: what `sdpa` knows of, or does not read.

    Returns:
        (rows, length, heads, size), and no weights.
    """
    from torch.nn import functional

    if cu_seq_lens_q is None or max_length_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown or dropout:
        raise ValueError(f"{VARLEN} attention has no {', '.join(unknown) or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    size = value.shape[-1]
    if size < query.shape[-1]:  # as of latent attention; the kernel has one size
        value = functional.pad(value, (0, query.shape[-1] - size))
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    found = kernel(queries, keys, values, cu_seq_lens_q, max_length_q, scale, sliding_window)
    return found[..., :size].unsqueeze(0), None


def mask(*sizes: Any, **asked: Any) -> Tensor | None:
    """transformers' mask interface: as for `sdpa`, and none where positions begin anew, which it takes for packed."""
    from transformers.masking_utils import sdpa_mask

    packed = not asked.get("allow_is_causal_skip", True) and not asked.get("use_vmap", False)
    if packed and asked.get("attention_mask") is None and asked.get("q_length", 0) > 1:
        return None
    return sdpa_mask(*sizes, **asked)


def kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Causal attention within each row by torch's FlashAttention; (tokens, heads, size), as the `query`."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    known = _arguments(varlen_attn)
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None or window >= longest else window - 1, 0)
    else:  # torch 2.10
        assert window is None or window >= longest, "this torch's kernel has no sliding window"
        options["is_causal"] = True
    if "scale" in known:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # Some norms leave float32 behind, which the kernel does not take.
    half = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    states = [part.to(half) for part in (query, key, value)]
    compute: Any = varlen_attn
    found: Tensor = compute(*states, ends, ends, longest, longest, **options)
    return found.to(query.dtype)


@cache
def _arguments(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _family(kernel: str) -> str:
    return kernel.split("/")[0]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what it would be in
        return False
