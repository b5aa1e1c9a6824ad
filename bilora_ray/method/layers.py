"""The forward pass of one adapted layer: W0 + s1 B1 A1, and in training + s2 B2 A2 (Eq. 7).

PEFT knows the auxiliary adapter only as one that is not active, so its evaluation, generation and merging see the
primary by construction. What adds the perturbation in training is `PerturbedLayer`, mixed into the class of each
layer while the auxiliary is attached. `FusedLayer`, which it stands on, is the same arithmetic for the primary alone:
plain LoRA gets all that Bi-LoRA gets.

On a bf16 base the factors, r wide, are rounded to bf16 for the products, not the input widened to fp32: what is kept
for the backward pass is the input itself, one for all layers that read it. The factors, their gradients and all that
an optimizer does with them stay fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bilora_ray.method.radius import Factors

PRIMARY = "default"
AUXILIARY = "auxiliary"
LOW_PRECISION = (torch.bfloat16, torch.float16)
# Where PEFT has its layers over quantised weights; to import it would import bitsandbytes.
QUANTISED = "peft.tuners.lora.bnb"

if TYPE_CHECKING:
    _Layer = lora.Linear
else:
    # Python can't give an object another class whose first base has another layout; `object` has none.
    _Layer = object


def add_low_rank(output: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """output + scaling * x A^T B^T, computed in the dtype of `x` whatever the factors' is.

    Args:
        output: ... x m, what the layer computes without this term.
        x: ... x n.
        A: r x n.
        B: m x r.
        scaling: s = alpha / r.

    Returns:
        ... x m, in the dtype of `output`.
    """
    return add_up_projection(output, F.linear(x, A.to(x.dtype)) * scaling, B)


def add_up_projection(output: Tensor, hidden: Tensor, B: Tensor) -> Tensor:
    """output + hidden B^T, where `hidden` (... x r) is already scaled: r is much smaller than m."""
    hidden = hidden.reshape(-1, B.shape[1]).to(output.dtype)
    return torch.addmm(output.reshape(-1, B.shape[0]), hidden, B.to(output.dtype).T).view(output.shape)


def add_base(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, B: Tensor) -> Tensor:
    """x W0^T + hidden B^T + bias, in the dtype of `x`, the two products rounded as one sum.

    Were the base's product rounded first, a perturbation of less than half a unit in the last place of it would be
    lost: in bf16 most of rho 0.05. So it is the base's product that is added, in its fp32 accumulator, to the
    adapters', which is small and hence finely rounded. This takes no longer: it is the same two products.

    Args:
        x: ... x n.
        weight: W0, m x n.
        bias: m, or None. It goes with the adapters' term: one rounding and one kernel fewer than after the sum.
        hidden: ... x r, scaled.
        B: m x r.

    Returns:
        ... x m.
    """
    hidden, up = hidden.reshape(-1, B.shape[1]), B.to(x.dtype).T
    output = torch.mm(hidden, up) if bias is None else torch.addmm(bias, hidden, up)
    output.addmm_(x.reshape(-1, weight.shape[1]), weight.T)
    return output.view(*x.shape[:-1], weight.shape[0])


class FusedLayer(_Layer):
    """Mixin over a PEFT LoRA layer that computes the primary's term with fewer, thinner and lighter operations.

    What it can't fuse (DoRA, other active adapters, merged weights, arguments for the base) PEFT's own forward does.
    """

    plain_class: ClassVar[type[LoraLayer]]
    # What the primary's factors were at first, of one that adds to W0 what has become of B1 A1 since.
    start: Factors | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the primary's term. x: ... x n; returns ... x m.

        Raises:
            ValueError: the primary has a `start`, which PEFT knows nothing of, and PEFT's own forward is asked for.
        """
        if args or kwargs or not self._can_fuse(x):
            if self.start is not None and not self.disable_adapters:
                raise ValueError("a primary with a start computes by itself alone; load what export_primary writes")
            return super().forward(x, *args, **kwargs)
        return self._fused_forward(x, (PRIMARY,))

    def change(self, adapter_name: str) -> Factors:
        """The product that one adapter adds to W0: its factors, or of a primary with a start B0 A0 that of twice r.

        s (B1 A1 - B0 A0) = s [B1 - B0, B0] [A1; A1 - A0]: as differences of factors, which are small, and exactly 0 at
        first. The difference of two products of W0's size would be rounded by as much as a low precision rounds W0.
        """
        factors = self.factors(adapter_name)
        if adapter_name != PRIMARY or self.start is None:
            return factors
        A, B, scaling = factors
        A_part = torch.cat([A, A - self.start.A])
        return Factors(A_part, torch.cat([B - self.start.B, self.start.B], dim=1), scaling)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the active adapters. ValueError if the primary has a start, as in `forward`."""
        if self.start is not None:
            raise ValueError("a primary with a start is not merged; merge what export_primary writes")
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def factors(self, adapter_name: str) -> Factors:
        """A, B and scaling of one adapter; A and B are the parameters themselves."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return Factors(cast(Tensor, A), cast(Tensor, B), self.scaling[adapter_name])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the plain class: the mixed one is made at run time and has no importable name."""
        return _rebuild, (type(self).__bases__[0], self.plain_class), self.__dict__

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether PEFT's own forward is base(x) + s1 B1 A1 dropout(x) and nothing else.

        Over quantised weights only low precision gains by it, and full precision keeps PEFT's order of sums.
        """
        return (
            (self.plain_class is lora.Linear or x.dtype in LOW_PRECISION)
            and self.active_adapters == [PRIMARY]
            and not self.disable_adapters
            and not self.merged
            and PRIMARY not in self.lora_variant
            and not self.lora_bias.get(PRIMARY, True)
        )

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The adapters `names` as one of the sum of their ranks: fewer thin products, and no m-sized temporary."""
        base, factors = self.base_layer, [self.change(name) for name in names]
        B = torch.cat([layer.B for layer in factors], dim=1) if len(factors) > 1 else factors[0].B
        if is_plain(base, x.dtype):
            return add_base(x, base.weight, base.bias, self._hidden(x, names, factors), B)
        output = base(x)
        return add_up_projection(output, self._hidden(x, names, factors), B)

    def _hidden(self, x: Tensor, names: Sequence[str], factors: Sequence[Factors]) -> Tensor:
        """s A x of all adapters, beside each other: ... x r."""
        dropout = self.lora_dropout[PRIMARY]
        if isinstance(dropout, nn.Identity) and all(layer.scaling == factors[0].scaling for layer in factors):
            A = torch.cat([layer.A for layer in factors]) if len(factors) > 1 else factors[0].A
            return F.linear(x, A.to(x.dtype)) * factors[0].scaling
        inputs = [dropout(x) if name == PRIMARY else x for name in names]
        hidden = [F.linear(z, A.to(x.dtype)) * s for z, (A, _, s) in zip(inputs, factors, strict=True)]
        return torch.cat(hidden, dim=-1)


class PerturbedLayer(FusedLayer):
    """Mixin over a PEFT LoRA layer that adds the auxiliary's perturbation in training mode, and only there.

    It also keeps the auxiliary trainable when PEFT freezes inactive adapters (HF Trainer does so on resume), and
    refuses to activate or merge it.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the primary's term, and in training plus s2 B2 A2 x. x: ... x n; returns ... x m.

        Raises:
            ValueError: `adapter_names` asks for the auxiliary.
        """
        adapter_names = kwargs.get("adapter_names")
        _refuse_auxiliary(adapter_names or ())
        if not self._is_perturbed() or adapter_names is not None:
            return super().forward(x, *args, **kwargs)
        if not args and not kwargs and self._can_fuse(x):
            return self._fused_forward(x, (PRIMARY, AUXILIARY))
        return add_low_rank(super().forward(x, *args, **kwargs), x, *self.factors(AUXILIARY))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters as PEFT does, and leave the auxiliary trainable unless in inference mode.

        Raises:
            ValueError: the auxiliary is among them.
        """
        _refuse_auxiliary([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.set_requires_grad(AUXILIARY, requires_grad=not inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the active adapters, the primary as a rule. ValueError if the auxiliary is asked for."""
        _refuse_auxiliary(adapter_names or ())
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _is_perturbed(self) -> bool:
        return self.training and PRIMARY in self.active_adapters and not self.disable_adapters and not self.merged


@cache
def mixed(kind: type[FusedLayer], plain: type[LoraLayer]) -> type[FusedLayer]:
    """The subclass of `plain` whose forward pass is `kind`'s."""
    name = f"{kind.__name__.removesuffix('Layer')}{plain.__name__}"
    return type(name, (kind, plain), {"plain_class": plain, "__module__": __name__})


def with_start(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers whose primary has a start, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in layers.items() if getattr(layer, "start", None) is not None}


def change_of(layer: LoraLayer) -> Factors:
    """What the primary of an adapted linear layer adds to W0: see `FusedLayer.change`."""
    if isinstance(layer, FusedLayer):
        return layer.change(PRIMARY)
    A, B = layer.lora_A[PRIMARY].weight, layer.lora_B[PRIMARY].weight
    return Factors(cast(Tensor, A), cast(Tensor, B), layer.scaling[PRIMARY])


def plain_class_of(layer: LoraLayer) -> type[LoraLayer]:
    """PEFT's own class of `layer`."""
    return layer.plain_class if isinstance(layer, FusedLayer) else type(layer)


def gains_by_fusing(layer: LoraLayer) -> bool:
    """Whether `layer` is of a class whose forward pass `FusedLayer` knows."""
    return type(layer) is lora.Linear or type(layer).__module__ == QUANTISED


def is_plain(base: Any, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Whether `base` does a product in low precision, all of it in `dtype`, and nobody looks at what it computes."""
    return (
        dtype in LOW_PRECISION
        and type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and base.weight.dtype == dtype
        and "forward" not in vars(base)  # as accelerate puts it there
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
    )


def _rebuild(kind: type[FusedLayer], plain: type[LoraLayer]) -> FusedLayer:
    mixed_class = mixed(kind, plain)
    return mixed_class.__new__(mixed_class)


def _refuse_auxiliary(adapter_names: list[str] | tuple[str, ...]) -> None:
    if AUXILIARY in adapter_names:
        raise ValueError(f"the adapter '{AUXILIARY}' is a training perturbation; it can't be activated or merged")
