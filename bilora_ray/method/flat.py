"""AdamW's update of many small tensors for the price of a few long ones, with the same numbers to the bit.

Adapters are hundreds of small tensors, and torch's AdamW makes a dozen calls for each of them. Here those whose update
is the same go through torch's own `adamw` as one tensor: elementwise arithmetic does not see where one of them ends.

Parameters and gradients are copied there and back, and stay what they are: parameters that share a memory would each be
pickled with all of it, and accelerate would save only the first. The moments are the optimizer's own: they stay in line
from step to step, and what `state` holds of a parameter is its part of the line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain, groupby, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim.adamw import adamw

States = Mapping[Tensor, dict[str, Any]]
# What AdamW keeps of a parameter.
KEPT = ("exp_avg", "exp_avg_sq", "step")
# Settings of AdamW's with which it keeps more, or keeps it elsewhere. No method has them.
UNUSUAL = ("amsgrad", "capturable", "differentiable", "fused")
# Numbers of the longest tensor that is joined with others: to copy a longer one would take longer than its calls.
LONGEST_ON_CPU, LONGEST_ON_GPU = 2**12, 2**20
# Numbers of all that are joined: on a GPU their copy is not to need much memory, on a CPU it stays in a core's cache.
MOST_ON_CPU, MOST_ON_GPU = 2**17, 2**24
# Calls with more numbers are spread over threads, if there are several: that costs more than it gives, a lot more on
# a machine that has other work.
MOST_ON_THREADS = 2**15


class Joined:
    """Parameters that are updated as one tensor.

    Args:
        places: where they are among those of their group that have a gradient, in the order of their length.
        parameters: of the same kind.
        states: what AdamW keeps of each, with the same step; its tensors are replaced by views.
    """

    def __init__(self, places: list[int], parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.places, self.parameters, self.states = places, parameters, states
        self.rows = [parameter.detach().view(-1) for parameter in parameters]
        self.sizes = [len(row) for row in self.rows]
        self.lengths = {size: len(list(same)) * size for size, same in groupby(self.sizes)}
        self.lines: dict[str, Tensor] = {}
        self.parts: list[Tensor] = []
        for key in KEPT:
            tensors = [state[key] for state in states]
            self.lines[key] = _flatten_dense_tensors(tensors)
            parts = _unflatten_dense_tensors(self.lines[key], tensors)
            for state, part in zip(states, parts, strict=True):
                state[key] = part
            self.parts += parts
        self.addresses = self._addresses()

    def holds(self) -> bool:
        """Whether nobody has replaced or moved a parameter or what is kept of it, or changed the step of one."""
        own = (map(dict.get, self.states, repeat(key)) for key in KEPT)
        return (
            all(map(is_, chain.from_iterable(own), self.parts))
            and self._addresses() == self.addresses
            and len(set(self.lines["step"].tolist())) == 1
        )

    def norms(self, gradient: Tensor) -> list[Tensor]:
        """Of the gradient of each parameter, in tensors of as many as are of one length."""
        rows = zip(gradient.split(list(self.lengths.values())), self.lengths, strict=True)
        return [torch.linalg.vector_norm(part.view(-1, size), dim=1) for part, size in rows]

    def step_(self, gradient: Tensor, settings: Mapping[str, Any]) -> None:
        """One step, in place, with the gradients of all in one tensor."""
        average, square, step = (self.lines[key] for key in KEPT)
        moved = torch.cat(self.rows)
        adamw([moved], [gradient], [average], [square], [], [step[0]], **settings)
        step[1:] += 1
        torch.split_with_sizes_copy(moved, self.sizes, out=self.rows)

    def _addresses(self) -> list[int]:
        # Moments are moved by who moves all of them.
        return [tensor.data_ptr() for tensor in (*self.parameters, *self.parts[:: len(self.parameters)])]


class Plan:
    """How the parameters of a group are updated: short ones together, each of the others by itself.

    Args:
        parameters: those that have a gradient, `alike`, each with a state.
        states: the optimizer's. What is joined has its moments and its step replaced by views.
    """

    def __init__(self, parameters: list[Tensor], states: States) -> None:
        self.parameters, self.states = parameters, list(states.values())
        on_cpu = parameters[0].is_cpu
        longest = LONGEST_ON_CPU if on_cpu else LONGEST_ON_GPU
        most = MOST_ON_CPU if on_cpu else MOST_ON_GPU
        if on_cpu and torch.get_num_threads() > 1:
            most = MOST_ON_THREADS
        short, self.alone = [], []
        for place, parameter in enumerate(parameters):
            size = parameter.numel()
            if 0 < size <= longest and parameter.is_contiguous():
                short.append((states[parameter]["step"].item(), size, place))
            else:
                self.alone.append(place)
        self.joined: list[Joined] = []
        for places in _cut(sorted(short), most):
            own = [parameters[place] for place in places]
            if len(places) > 1:
                self.joined.append(Joined(places, own, [states[parameter] for parameter in own]))
            else:
                self.alone += places
        places = [place for joined in self.joined for place in joined.places] + self.alone
        self.order = torch.tensor(places, device=parameters[0].device).argsort()

    def holds(self, parameters: list[Tensor], states: States) -> bool:
        """Whether `parameters` are those of before, and nothing of what is joined has been replaced."""
        return (
            _same(parameters, self.parameters)
            # To look up each parameter's would take longer than all the rest.
            and _same(states.values(), self.states)
            and all(joined.holds() for joined in self.joined)
        )

    def step_(self, gradients: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """One step of torch's AdamW with the settings of `group`, in place, with the gradients limited first.

        As they are limited, `gradients` may change: those that are joined do not.
        """
        lines = [_flatten_dense_tensors([gradients[place] for place in joined.places]) for joined in self.joined]
        apart = [gradients[place] for place in self.alone]
        if group["max_grad_norm"] is not None:
            norms = [norm for joined, line in zip(self.joined, lines, strict=True) for norm in joined.norms(line)]
            norms += [torch.stack(torch._foreach_norm(apart))] if apart else []
            # In the order in which torch sums them up.
            total = torch.linalg.vector_norm(torch.cat(norms)[self.order])
            torch._foreach_mul_([*lines, *apart], (group["max_grad_norm"] / (total + 1e-6)).clamp(max=1.0))
        settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize", "foreach", *UNUSUAL)}
        settings["beta1"], settings["beta2"] = group["betas"]
        for joined, line in zip(self.joined, lines, strict=True):
            joined.step_(line, settings)
        if apart:
            parameters = [self.parameters[place] for place in self.alone]
            averages, squares, steps = ([states[parameter][key] for parameter in parameters] for key in KEPT)
            adamw(parameters, apart, averages, squares, [], steps, **settings)


def with_gradients(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of `parameters` that have a gradient, and their gradients."""
    parameters = list(parameters)
    gradients = list(map(attrgetter("grad"), parameters))
    moving = [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    return moving, [gradient for gradient in gradients if gradient is not None]


def alike(parameters: list[Tensor], gradients: list[Tensor]) -> bool:
    """Whether all are real, of one dtype, on one device, and neither packed nor in parts, as FSDP has them."""
    kinds = {(type(tensor) in (Tensor, nn.Parameter), tensor.dtype, tensor.device) for tensor in parameters}
    kinds |= {(type(tensor) is Tensor, tensor.dtype, tensor.device) for tensor in gradients}
    strided = all(gradient.layout is torch.strided for gradient in gradients)
    return len(kinds) == 1 and next(iter(kinds))[0] and strided and not parameters[0].is_complex()


def _same(ours: Collection[Any], theirs: Collection[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))


def _cut(short: list[tuple[float, int, int]], most: int) -> list[list[int]]:
    """The places of all (step, length, place), together if their step is one, with no more than `most` numbers."""
    cut: list[list[int]] = []
    numbers, before = 0, None
    for step, size, place in short:
        numbers += size
        if step != before or numbers > most:
            cut.append([])
            numbers, before = size, step
        cut[-1].append(place)
    return cut
