"""What can be displaced of an adapter's merged weight W = W0 + s1 B1 A1, and what the loss does there.

Two spaces are looked at: the *full* one of all adapted weights W, and the *LoRA* one of the factors A1 and B1 (arXiv
2508.19564, appendix N). What is trained beside the adapter, such as a head, stays where it is.

No weight is ever written. A displacement is added to what a layer computes, x (W + D)^T = x W^T + x D^T, by a hook that
is removed in any case: so the weights are what they were to the bit, quantised ones too, whenever and however it ends.
What is as large as W (the gradient, a direction, a vector of Lanczos) lies in host memory, and is on the device one
layer at a time. All is computed in evaluation mode.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilora_ray.method.adapters import UNSUPPORTED
from bilora_ray.method.layers import LOW_PRECISION, PRIMARY, add_low_rank, change_of, is_plain
from bilora_ray.method.radius import Factors

# One tensor a part of a space, in host memory; fp32, or fp64 on an fp64 base.
Vector = list[Tensor]
# The number of a layer, what it reads (... x n) and what it computed (... x m) -> what it shall have computed.
Change = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """A part of the rows, as many as are computed at once.

    Attributes:
        loss: computes their mean loss, a scalar, anew at each call. It is the same in each, so nothing is drawn.
        weight: how many predictions that is the mean of: the loss of several passes is the weighted mean.
        rows: how many it has, by which a batch counts among others.
    """

    loss: Callable[[], Tensor]
    weight: float
    rows: int


class Space(ABC):
    """What can be displaced of a model's adapted layers.

    Args:
        model: with the primary adapter, not merged. An auxiliary takes no part.

    Raises:
        ValueError: no linear layer is adapted, another layer is, or one is merged.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = _adapted_layers(model)
        factors = [_factors(layer) for layer in self.layers]
        self.dtype = torch.promote_types(torch.float32, factors[0].A.dtype)
        self.device = factors[0].A.device

    @abstractmethod
    def gradient(self, passes: Sequence[Pass]) -> Vector:
        """The gradient of the mean loss of `passes` at W."""

    @abstractmethod
    def product(self, passes: Sequence[Pass], vector: Vector) -> Vector:
        """The Hessian of the mean loss of `passes` at W, times `vector`: exact, by a derivative of a derivative."""

    @abstractmethod
    def shapes(self) -> Iterator[tuple[int, int]]:
        """(filters, weights of each) of every part, in order."""

    @abstractmethod
    def filter_norms(self) -> Iterator[Tensor]:
        """(filters, 1) of every part, in order: the norm of each row of what can be displaced."""

    @abstractmethod
    def _moved(self, number: int, x: Tensor, output: Tensor, direction: Vector, scale: float) -> Tensor:
        """What layer `number` computes of `x` at W + `scale` * `direction`; `output` is what it does at W."""

    def zeros(self) -> Vector:
        """The vector without length."""
        return [torch.zeros(shape, dtype=self.dtype) for shape in self.shapes()]

    def normal(self, generator: torch.Generator) -> Vector:
        """A vector of independent normal numbers, drawn on the CPU: the same whatever the device is."""
        return [torch.randn(shape, dtype=self.dtype, generator=generator) for shape in self.shapes()]

    def loss(self, passes: Sequence[Pass], direction: Vector | None = None, scale: float = 0.0) -> float:
        """The mean loss of `passes` at W + `scale` * `direction`; at W without one."""
        change = None if direction is None else partial(self._moved, direction=direction, scale=scale)
        return self._loss(passes, change)

    def _loss(self, passes: Sequence[Pass], change: Change | None) -> float:
        with torch.no_grad(), evaluating(self.model), ExitStack() as moved:
            if change is not None:
                moved.enter_context(_changing(self.layers, change))
            return math.fsum(share * one.loss().item() for one, share in _shares(passes))

    def _on_device(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)


class FullSpace(Space):
    """The weights W of all adapted layers: a part is the m x n displacement D of one, y = x (W + D)^T."""

    def gradient(self, passes: Sequence[Pass]) -> Vector:
        """dL/dW. One layer's is on the device at a time, and is added up in host memory."""
        gradient = self.zeros()
        sites = [_Site(found) for found in gradient]
        with _deriving(self.model):
            for one, share in _shares(passes):
                loss, step = self._watched(one, _Watched, sites)
                torch.autograd.grad(share * loss, step, allow_unused=True)
        return gradient

    def product(self, passes: Sequence[Pass], vector: Vector) -> Vector:
        """H v, as the gradient of the loss' derivative along v. v and H v are on the device one layer at a time."""
        product = self.zeros()
        sites = [_Site(found, partial(self._on_device, part)) for found, part in zip(product, vector, strict=True)]
        with _deriving(self.model), sdpa_kernel(SDPBackend.MATH):  # other kernels of attention can be derived once only
            for one, share in _shares(passes):
                loss, step = self._watched(one, _Twice, sites)
                (slope,) = torch.autograd.grad(share * loss, step, create_graph=True, materialize_grads=True)
                if slope.requires_grad:
                    torch.autograd.grad(slope, step, allow_unused=True)
        return product

    def loss_beside(self, passes: Sequence[Pass], factors: Sequence[Factors]) -> float:
        """The mean loss of `passes` at W + s B A, given for every layer; B A is not formed."""

        def change(number: int, x: Tensor, output: Tensor) -> Tensor:
            A, B, scaling = factors[number]
            term = F.linear(F.linear(x, A.detach().to(x.dtype)) * scaling, B.detach().to(x.dtype))
            return _sum(self.layers[number], x, output, term)

        return self._loss(passes, change)

    def factors(self, adapter_name: str) -> list[Factors]:
        """A, B and scaling of one adapter in every layer; A and B are the parameters themselves."""
        return [_factors(layer, adapter_name) for layer in self.layers]

    @property
    def low_precision(self) -> bool:
        """Whether some of the model is in less than fp32."""
        return any(parameter.dtype in LOW_PRECISION for parameter in self.model.parameters())

    def shapes(self) -> Iterator[tuple[int, int]]:
        """m x n of every layer."""
        return ((cast(int, layer.out_features), cast(int, layer.in_features)) for layer in self.layers)

    def filter_norms(self) -> Iterator[Tensor]:
        """Of the rows of W, of each layer: of a DoRA its magnitudes. ValueError where W is of another variant."""
        for layer in self.layers:
            if isinstance(layer.lora_variant.get(PRIMARY), DoraLinearVariant):
                magnitude = cast(Tensor, layer.lora_magnitude_vector[PRIMARY].weight)
                yield magnitude.detach().to(self.dtype).abs().unsqueeze(1).cpu()
                continue
            _check_plain(layer)
            A, B, scaling = change_of(layer)
            base = dequantize_module_weight(layer.get_base_layer()).detach()
            weight = (base.T if getattr(layer, "fan_in_fan_out", False) else base).to(self.dtype)
            merged = torch.addmm(weight, B.detach().to(self.dtype), A.detach().to(self.dtype), alpha=scaling)
            yield merged.norm(dim=1, keepdim=True).cpu()

    def _moved(self, number: int, x: Tensor, output: Tensor, direction: Vector, scale: float) -> Tensor:
        displacement = (self._on_device(direction[number]) * scale).to(x.dtype)
        return _sum(self.layers[number], x, output, F.linear(x, displacement))

    def _watched(self, one: Pass, watched: type[Function], sites: Sequence[_Site]) -> tuple[Tensor, Tensor]:
        """The loss of a pass, and the step along the sites' vectors that it is a function of, now 0."""
        step = torch.zeros((), dtype=self.dtype, device=self.device, requires_grad=True)

        def change(number: int, x: Tensor, output: Tensor) -> Tensor:
            return cast(Tensor, watched.apply(output, x, step, sites[number]))

        with _changing(self.layers, change):
            return one.loss(), step


class LoraSpace(Space):
    """The primary's factors: of every layer a part for A1, r x n, and one for B1, m x r."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for layer in self.layers:
            _check_plain(layer)

    def gradient(self, passes: Sequence[Pass]) -> Vector:
        """(dL/dA1, dL/dB1)."""
        gradient = self.zeros()
        with _deriving(self.model):
            for one, share in _shares(passes):
                loss, leaves = self._watched(one)
                add_(gradient, torch.autograd.grad(share * loss, leaves, materialize_grads=True))
        return gradient

    def product(self, passes: Sequence[Pass], vector: Vector) -> Vector:
        """H v, as the gradient of the loss' derivative along v."""
        product = self.zeros()
        along = [self._on_device(part) for part in vector]
        with _deriving(self.model), sdpa_kernel(SDPBackend.MATH):
            for one, share in _shares(passes):
                loss, leaves = self._watched(one)
                slopes = torch.autograd.grad(share * loss, leaves, create_graph=True, materialize_grads=True)
                slope = torch.stack([(a * b).sum() for a, b in zip(slopes, along, strict=True)]).sum()
                add_(product, torch.autograd.grad(slope, leaves, materialize_grads=True))
        return product

    def shapes(self) -> Iterator[tuple[int, int]]:
        """r x n and m x r of every layer."""
        return (cast(tuple[int, int], tuple(part.shape)) for part in self._parts())

    def filter_norms(self) -> Iterator[Tensor]:
        """Of the rows of A1 and of B1, of each layer."""
        return (part.to(self.dtype).norm(dim=1, keepdim=True).cpu() for part in self._parts())

    def _parts(self) -> Iterator[Tensor]:
        return (part.detach() for layer in self.layers for part in _factors(layer)[:2])

    def _moved(self, number: int, x: Tensor, output: Tensor, direction: Vector, scale: float) -> Tensor:
        change_of_A, change_of_B = (self._on_device(part) * scale for part in direction[2 * number : 2 * number + 2])
        return self._at(number, x, output, change_of_A, change_of_B)

    def _at(self, number: int, x: Tensor, output: Tensor, change_of_A: Tensor, change_of_B: Tensor) -> Tensor:
        A, B, scaling = _factors(self.layers[number])
        hidden = F.linear(x, change_of_A.to(x.dtype)) * scaling
        term = F.linear(hidden, (B.detach() + change_of_B).to(x.dtype))
        return _sum(self.layers[number], x, output, add_low_rank(term, x, A.detach(), change_of_B, scaling))

    def _watched(self, one: Pass) -> tuple[Tensor, list[Tensor]]:
        """The loss of a pass, and the changes of the factors that it is a function of, now 0."""
        leaves = [self._on_device(part).requires_grad_() for part in self.zeros()]

        def change(number: int, x: Tensor, output: Tensor) -> Tensor:
            return self._at(number, x, output, leaves[2 * number], leaves[2 * number + 1])

        with _changing(self.layers, change):
            return one.loss(), leaves


def inner(one: Vector, other: Vector) -> float:
    """The inner product of two vectors, added up in fp64."""
    parts = zip(one, other, strict=True)
    return math.fsum(torch.sum(a * b, dtype=torch.float64).item() for a, b in parts)


def norm(vector: Vector) -> float:
    """The Frobenius norm over all parts."""
    return math.sqrt(inner(vector, vector))


def add_(vector: Vector, other: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add `scale` * `other` to `vector`, in place."""
    for part, added in zip(vector, other, strict=True):
        part.add_(added.to(part.device, part.dtype), alpha=scale)


def scale_(vector: Vector, by: float) -> Vector:
    """`vector`, multiplied in place."""
    for part in vector:
        part.mul_(by)
    return vector


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and after it for each module the one that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Site:
    """Where the gradient of one layer's displacement is added up, and what it is displaced along."""

    def __init__(self, found: Tensor, along: Callable[[], Tensor] | None = None) -> None:
        self.found = found
        self.along = along

    def add(self, of_output: Tensor, of_input: Tensor) -> None:
        """Add (... x m)^T (... x n)."""
        part = of_output.reshape(-1, of_output.shape[-1]).T @ of_input.reshape(-1, of_input.shape[-1])
        self.found.add_(part.to(self.found.device, self.found.dtype))


class _Watched(Function):
    """x, y -> y = x W^T + x D^T at D = 0, whose backward pass adds dL/dD to a site and makes no tensor of the graph."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, step: Tensor, site: _Site) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.site = site
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, step = ctx.saved_tensors
        ctx.site.add(gradients[0], x)
        return gradients[0], None, torch.zeros_like(step), None


class _Twice(Function):
    """The same at D = step * V, step = 0. The first backward pass derives by the step, the second one by D.

    D is in the loss' derivative twice: in y = x D^T, and in dL/dx = dL/dy D, which is `_Returned`.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, step: Tensor, site: _Site) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.site = site
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, step = ctx.saved_tensors
        if torch.is_grad_enabled():  # the first, which is to be derived
            returned = _Returned.apply(x, gradients[0], ctx.site)
            return gradients[0], returned, _Slope.apply(x, gradients[0], ctx.site).to(step.dtype), None
        ctx.site.add(gradients[0], x)
        return gradients[0], None, None, None


class _Returned(Function):
    """dL/dy D at D = 0, whose backward pass adds the gradient of D to a site."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of_output: Tensor, site: _Site) -> Tensor:
        ctx.save_for_backward(of_output)
        ctx.site = site
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (of_output,) = ctx.saved_tensors
        ctx.site.add(of_output, gradients[0])
        return None, None, None


class _Slope(Function):
    """<dL/dy, x V^T>, one layer's part in the loss' derivative along V; V is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of_output: Tensor, site: _Site) -> Tensor:
        ctx.save_for_backward(x, of_output)
        ctx.site = site
        full = torch.promote_types(torch.float32, x.dtype)
        return torch.sum(of_output * F.linear(x, site.along().to(x.dtype)), dtype=full)  # type: ignore[misc]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, of_output = ctx.saved_tensors
        along, outer = ctx.site.along().to(x.dtype), gradients[0].to(x.dtype)
        return outer * (of_output @ along), outer * F.linear(x, along), None


@contextmanager
def _deriving(model: nn.Module) -> Iterator[None]:
    with torch.enable_grad(), evaluating(model):
        yield


def _shares(passes: Sequence[Pass]) -> Iterator[tuple[Pass, float]]:
    """Each pass, and its share in the mean loss."""
    total = math.fsum(one.weight for one in passes)
    return ((one, one.weight / total) for one in passes)


@contextmanager
def _changing(layers: Sequence[LoraLayer], change: Change) -> Iterator[None]:
    """Have each layer compute what `change` says."""

    def hook(number: int, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(number, inputs[0], output)

    handles = []
    try:
        for number, layer in enumerate(layers):
            handles.append(cast(nn.Module, layer).register_forward_hook(partial(hook, number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum(layer: LoraLayer, x: Tensor, output: Tensor, term: Tensor) -> Tensor:
    """`output` + `term`; in low precision rounded once, or a small displacement would be lost: see `add_base`."""
    base = layer.get_base_layer()
    if not is_plain(base, x.dtype) or PRIMARY in layer.lora_variant or layer.lora_bias.get(PRIMARY, False):
        return output + term
    term = add_low_rank(term, x, *change_of(layer))
    if base.bias is not None:
        term = term + base.bias
    rows, outputs = x.reshape(-1, base.in_features), term.reshape(-1, base.out_features)
    return torch.addmm(outputs, rows, base.weight.T).view(output.shape)


def _adapted_layers(model: nn.Module) -> list[LoraLayer]:
    found = (module for module in model.modules() if isinstance(module, LoraLayer) and PRIMARY in module.r)
    layers: list[LoraLayer] = list(found)
    if not layers:
        raise ValueError("the model has no adapter whose surroundings could be measured")
    if any(isinstance(layer, UNSUPPORTED) for layer in layers):
        raise ValueError("sharpness is measured of linear layers only")
    if any(layer.merged for layer in layers):
        raise ValueError("unmerge the adapter before its sharpness is measured")
    return layers


def _factors(layer: LoraLayer, adapter_name: str = PRIMARY) -> Factors:
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return Factors(cast(Tensor, A), cast(Tensor, B), layer.scaling[adapter_name])


def _check_plain(layer: LoraLayer) -> None:
    if PRIMARY in layer.lora_variant:
        raise ValueError("the LoRA space and filters are those of W0 + s B A, and of no variant such as DoRA")
