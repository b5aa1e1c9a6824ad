"""What the forward pass of adapted layers keeps for the backward pass, on a bf16 base.

A Llama-shaped model with random weights and adapters on every linear layer; one forward and backward pass each. The
contenders differ in the arithmetic of their adapted layers only:
- `before`: the adapters of both methods as they were in 0.1.0: the input of each layer widened to fp32, the two
  adapters of Bi-LoRA fused (for `lora` that is PEFT's own forward);
- `PEFT`: PEFT's forward with fp32 adapters, which widens each input too; for `bilora` with both adapters active;
- `PEFT + autocast`: the same under `torch.autocast` to bf16, as HF Trainer's `bf16=True` has it;
- `ours`: `bilora_ray.method`.

Bytes are of distinct memories that autograd keeps, parameters and buffers left out. Times are the process's CPU time
of a pass, each a ratio to `before`'s of the same round, the order reversed every round: the median of the rounds.

    python benchmarks/saved_bytes.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bilora_ray.method import attach_auxiliary, fuse
from bilora_ray.method.layers import AUXILIARY, PRIMARY, PerturbedLayer

RANK = 8
VOCABULARY = 1024


class Kept:
    """A context that sees what autograd keeps of the passes in it.

    Attributes:
        storages: the memories, by their addresses. `model`'s parameters and buffers are none of them.
        dtypes: of the tensors in each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor)

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def bytes(self, dtype: torch.dtype | None = None) -> int:
        """All of them, or those of one dtype."""
        return sum(s.nbytes() for at, s in self.storages.items() if dtype in (None, self.dtypes[at]))

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            # Held, so that no later one gets its address.
            self.storages[storage.data_ptr()] = storage
            self.dtypes[storage.data_ptr()] = tensor.dtype
        return tensor


class Before(lora.Linear):
    """Bi-LoRA's layer as it was: the input and the sum in fp32, the output rounded."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus both adapters' terms. x: ... x n; returns ... x m."""
        A = torch.cat([self.lora_A[name].weight for name in (PRIMARY, AUXILIARY)])
        B = torch.cat([self.lora_B[name].weight for name in (PRIMARY, AUXILIARY)], dim=1)
        output = self.base_layer(x)
        hidden = F.linear(x.to(A.dtype), A) * self.scaling[PRIMARY]
        return (output + F.linear(hidden, B)).to(output.dtype)


def adapted(base: nn.Module, method: str, contender: str) -> PeftModel:
    """A copy of `base` with adapters, B random as it is after some steps, in training mode."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config)
    if method == "bilora":
        attach_auxiliary(model, RANK)
    elif contender == "ours":
        fuse(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    if contender != "ours":
        for layer in model.modules():
            if isinstance(layer, PerturbedLayer):
                layer.__class__ = Before if contender == "before" else layer.plain_class
                if contender != "before":
                    layer.set_adapter([PRIMARY, AUXILIARY])
    return model.train()


def one_pass(model: PeftModel, batch: dict[str, Tensor], context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Forward and backward."""
    model.zero_grad()
    with context():
        loss = model(**batch).loss
    loss.backward()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=8, help="passes of each contender that are timed")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = {"hidden_size": arguments.hidden, "intermediate_size": arguments.hidden * 7 // 2 // 64 * 64}
    heads = {"num_attention_heads": arguments.hidden // 64, "num_key_value_heads": max(1, arguments.hidden // 256)}
    config = LlamaConfig(**shape, **heads, num_hidden_layers=arguments.layers, vocab_size=VOCABULARY)
    base = LlamaForCausalLM(config).to(arguments.device, torch.bfloat16)
    ids = torch.randint(VOCABULARY, (arguments.rows, arguments.length), device=arguments.device)
    batch = {"input_ids": ids, "labels": ids}
    autocast = partial(torch.autocast, base.device.type, torch.bfloat16)
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "before": nullcontext,
        "PEFT": nullcontext,
        "PEFT + autocast": autocast,
        "ours": nullcontext,
    }
    print(f"torch {torch.__version__}; {vars(arguments)}\n")
    print("| method | layers | kept, MB | of it fp32 | / before | / autocast | CPU time / before |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for method in ("lora", "bilora"):
        models = {name: adapted(base, method, name) for name in contexts}
        kept = {}
        for name, model in models.items():
            with Kept(model) as kept[name]:
                one_pass(model, batch, contexts[name])
        total = {name: seen.bytes() for name, seen in kept.items()}
        wide = {name: seen.bytes(torch.float32) for name, seen in kept.items()}
        del kept
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for round_ in range(arguments.rounds):
            for name in list(models) if round_ % 2 else reversed(models):
                started = time.process_time()
                one_pass(models[name], batch, contexts[name])
                seconds[name].append(time.process_time() - started)
        for name in models:
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["before"], strict=True))
            print(
                f"| {method} | {name} | {total[name] / 1e6:.1f} | {wide[name] / 1e6:.1f} "
                f"| {total[name] / total['before']:.2f} | {total[name] / total['PEFT + autocast']:.2f} | {ratio:.2f} |"
            )


if __name__ == "__main__":
    main()
