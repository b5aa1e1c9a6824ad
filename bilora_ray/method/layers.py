"""The forward pass of one adapted layer: W0 + s1 B1 A1, and in training + s2 B2 A2 (Eq. 7).

PEFT knows the auxiliary adapter only as one that is not active, so its evaluation, generation and merging see the
primary by construction. What adds the perturbation in training is `PerturbedLayer`, mixed into the class of each
layer while the auxiliary is attached.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bilora_ray.method.radius import Factors

PRIMARY = "default"
AUXILIARY = "auxiliary"

if TYPE_CHECKING:
    _Layer = lora.Linear
else:
    # Python can't give an object another class whose first base has another layout; `object` has none.
    _Layer = object


def add_low_rank(output: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """output + scaling * x A^T B^T.

    Args:
        output: ... x m, what the layer computes without this term.
        x: ... x n, in the dtype of A.
        A: r x n.
        B: m x r.
        scaling: s = alpha / r.

    Returns:
        ... x m, in the dtype of `output`.
    """
    return add_up_projection(output, F.linear(x, A) * scaling, B)


def add_up_projection(output: Tensor, hidden: Tensor, B: Tensor) -> Tensor:
    """output + hidden B^T, where `hidden` (... x r) is already scaled: r is much smaller than m.

    A bf16 `output` with fp32 factors is added in fp32 and rounded once, as PEFT does.
    """
    if output.dtype != hidden.dtype:
        return (output + F.linear(hidden, B)).to(output.dtype)
    rows = torch.addmm(output.reshape(-1, B.shape[0]), hidden.reshape(-1, B.shape[1]), B.T)
    return rows.view(output.shape)


class PerturbedLayer(_Layer):
    """Mixin over a PEFT LoRA layer that adds the auxiliary's perturbation in training mode, and only there.

    It also keeps the auxiliary trainable when PEFT freezes inactive adapters (HF Trainer does so on resume), and
    refuses to activate or merge it.
    """

    plain_class: ClassVar[type[LoraLayer]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the primary's term, and in training plus s2 B2 A2 x. x: ... x n; returns ... x m.

        Raises:
            ValueError: `adapter_names` asks for the auxiliary.
        """
        adapter_names = kwargs.get("adapter_names")
        _refuse_auxiliary(adapter_names or ())
        if not self._is_perturbed() or adapter_names is not None:
            return super().forward(x, *args, **kwargs)
        if not args and not kwargs and self._can_fuse():
            return self._fused_forward(x)
        output = super().forward(x, *args, **kwargs)
        A, B, scaling = self.factors(AUXILIARY)
        return add_low_rank(output, self._cast_input_dtype(x, A.dtype), A, B, scaling)

    def factors(self, adapter_name: str) -> Factors:
        """A, B and scaling of one adapter; A and B are the parameters themselves."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return Factors(cast(Tensor, A), cast(Tensor, B), self.scaling[adapter_name])

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the plain class: the mixed one is made at run time and has no importable name."""
        return _rebuild, (self.plain_class,), self.__dict__

    def _is_perturbed(self) -> bool:
        return self.training and PRIMARY in self.active_adapters and not self.disable_adapters and not self.merged

    def _can_fuse(self) -> bool:
        """Whether PEFT's own forward is base(x) + s1 B1 A1 dropout(x), in the auxiliary's dtype, and nothing else."""
        return (
            self.plain_class is lora.Linear
            and self.active_adapters == [PRIMARY]
            and PRIMARY not in self.lora_variant
            and not self.lora_bias[PRIMARY]
            and self.lora_A[PRIMARY].weight.dtype == self.lora_A[AUXILIARY].weight.dtype
        )

    def _fused_forward(self, x: Tensor) -> Tensor:
        """Both adapters as one of rank r1 + r2: fewer thin products, and no m-sized temporary."""
        A1, B1, s1 = self.factors(PRIMARY)
        A2, B2, s2 = self.factors(AUXILIARY)
        output = self.base_layer(x)
        x = self._cast_input_dtype(x, A1.dtype)
        dropout = self.lora_dropout[PRIMARY]
        if s1 == s2 and isinstance(dropout, torch.nn.Identity):
            hidden = F.linear(x, torch.cat([A1, A2])) * s1
        else:
            hidden = torch.cat([F.linear(dropout(x), A1) * s1, F.linear(x, A2) * s2], dim=-1)
        return add_up_projection(output, hidden, torch.cat([B1, B2], dim=1))


@cache
def perturbed(plain: type[LoraLayer]) -> type[PerturbedLayer]:
    """The subclass of `plain` that adds the perturbation."""
    return type(f"Perturbed{plain.__name__}", (PerturbedLayer, plain), {"plain_class": plain, "__module__": __name__})


def _rebuild(plain: type[LoraLayer]) -> PerturbedLayer:
    kind = perturbed(plain)
    return kind.__new__(kind)


def _refuse_auxiliary(adapter_names: list[str] | tuple[str, ...]) -> None:
    if AUXILIARY in adapter_names:
        raise ValueError(f"the adapter '{AUXILIARY}' is a training perturbation; it can't be activated or merged")
