"""A model on several workers: a copy on each, or a part of the weights on each (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bilora_ray.training.distributed.workers import Workers

# Numbers that workers add up at one time: their copy is not to need as much memory as all gradients of a model.
MOST_AT_ONCE = 2**26


class Network:
    """What computes in training and in evaluation.

    Args:
        model: with all adapters; sharded already, if it is to be.
        workers: who share the work.

    Attributes:
        evaluated: computes in evaluation, without the auxiliary.
        divides_by: by how much the sum over the workers of each one's gradients is divided where they are shared.
    """

    def __init__(self, model: nn.Module, workers: Workers) -> None:
        # PEFT calls the base model's forward past its hooks, in which FSDP gathers the weights.
        self.evaluated: Any = base_of(model) if workers.sharded else model
        self.divides_by = workers.world_size if workers.sharded else 1
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._copies = workers.world_size > 1 and not workers.sharded
        if self._copies:
            # All loaded the same files; only what started random is sent, since the base may be large.
            for parameter in self._trained:
                dist.broadcast(parameter.detach(), 0)

    def __call__(self, **batch: Tensor) -> Any:
        """The output of the training forward pass."""
        return self.evaluated(**batch)

    def get_base_model(self) -> Any:
        """transformers' model in it, as PEFT has it."""
        return base_of(self.evaluated)

    def accumulating(self, last: bool) -> None:
        """Parts of a model share the gradients of the pass that follows, with those before it, if it is the `last`."""
        if isinstance(self.evaluated, FSDPModule):
            self.evaluated.set_requires_gradient_sync(last)

    def share_gradients(self) -> None:
        """Give each copy of the model the sum of the gradients of all, an adapter's at once, for they are few.

        torch's DDP would do that amid the last pass, in which a worker that is out of memory would keep all waiting.
        A copy may have none of a layer that was left out, or of an expert without tokens, and another one have it: all
        send as much, and with it how many have which, which only who lacks one waits to read.
        """
        if not self._copies or not self._trained:
            return
        lacking = [index for index, parameter in enumerate(self._trained) if parameter.grad is None]
        have = torch.ones(len(self._trained), device=self._trained[0].device)
        for index in lacking:
            have[index] = 0
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._trained]
        for some in _at_once([*gradients, have]):
            # In fp32, where the gradients are in bf16.
            together = torch.cat([one.flatten().to(torch.promote_types(one.dtype, torch.float32)) for one in some])
            dist.all_reduce(together)
            for one, part in zip(some, together.split([one.numel() for one in some]), strict=True):
                one.copy_(part.view_as(one))
        counts = have.tolist() if lacking else []
        for index in lacking:
            self._trained[index].grad = gradients[index] if counts[index] else None

    def reshard(self) -> None:
        """Give each worker its part of the parameters again, where an evaluation has left some of them whole."""
        if isinstance(self.evaluated, FSDPModule):
            self.evaluated.reshard()


def _at_once(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in parts that have no more than MOST_AT_ONCE numbers each, or are of one."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(one.numel() for one in some) + tensor.numel() > MOST_AT_ONCE:
            yield some
            some = []
        some.append(tensor)
    yield some


def base_of(model: Any) -> Any:
    """transformers' own model in a `model` that may be around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shard(model: nn.Module, workers: Workers) -> None:
    """Leave on each worker a part of every parameter, in place, as the first worker has them.

    A factor of an adapter is cut along its long side, so that Gram matrices are sums over the workers. On the other
    workers `model` may be on the meta device: they never hold all of it.
    """
    base = base_of(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(device.type, (workers.world_size,))
    wide = {
        id(parameter)
        for name, parameter in base.named_parameters()
        if ".lora_A." in name and parameter.shape[1] % workers.world_size == 0
    }

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if id(parameter) in wide else None

    full = {**dict(base.named_parameters()), **dict(base.named_buffers())} if workers.is_first else {}
    full = {name: tensor.detach() for name, tensor in full.items()}
    blocks = tuple(base._no_split_modules or ())
    for module in base.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    fully_shard(base, mesh=mesh, shard_placement_fn=placement)
    if not workers.is_first:
        base.to_empty(device=device)
    _send_out(base, full, device)


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, put together on every worker if it is sharded: all workers must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensors: Mapping[str, Tensor], workers: Workers) -> dict[str, Tensor]:
    """`tensors`, put together one after the other in the first worker's main memory: the others get none.

    All workers must ask for it, with the same names in the same order.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if workers.is_first:
            kept[name] = whole(tensor).cpu()
        else:
            whole(tensor)
    return kept


def put(target: Tensor, value: Tensor) -> None:
    """Copy `value`, which every worker has, into `target`, of which each may have a part."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.detach().copy_(value)


@torch.no_grad()
def _send_out(base: nn.Module, full: dict[str, Tensor], device: torch.device) -> None:
    """Fill each worker's part of the parameters, and its buffers, from the first worker's."""
    for name, parameter in base.named_parameters():
        assert isinstance(parameter, DTensor)
        value = full[name].to(device) if full else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    for name, buffer in base.named_buffers():
        if full:
            buffer.copy_(full[name])
        dist.broadcast(buffer, 0)
