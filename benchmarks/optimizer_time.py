"""What the optimizer's part of a step costs: limits, AdamW and projection, without the passes.

On a GPU this is time in which Python keeps it waiting, so what counts is the process's CPU time. An adapter on each of
the 7 linear layers of 32 blocks is 448 factors, and Bi-LoRA has two. The contenders take turns, step by step, each
after a forward and a backward pass of its own copy of the model, and the order is reversed every round:
- `per-tensor`: torch's `clip_grad_norm_` and AdamW over each branch, and the projection;
- `ours`: the same in one `step`.
Each round gives a ratio; the table holds their median and its 95 % bootstrap interval. That both end with the same
parameters, to the bit on a CPU, is checked.

    python benchmarks/optimizer_time.py [--hidden 32 64 256] [--rounds 12] [--device cpu]
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bilora_ray.method import build_method, settings_of
from bilora_ray.method.adapters import auxiliary_factors, has_auxiliary
from bilora_ray.method.base import MethodAdamW
from bilora_ray.method.radius import project_

RANK = 8
SETTINGS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "rho": 0.05,
    "auxiliary_rank": RANK,
    "auxiliary_learning_rate": 5e-4,
}
VOCABULARY = 128
WARMUP = 3
# Of a model with the optimizer of its method: what moves it once there are gradients.
Contender = Callable[[PeftModel, MethodAdamW], Callable[[], object]]


def per_tensor(model: PeftModel, optimizer: MethodAdamW) -> Callable[[], object]:
    """Torch's own parts, with the groups of `optimizer`."""
    keys = ("params", "lr", "weight_decay", "maximize")
    groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]
    adamw = torch.optim.AdamW(groups)
    factors = auxiliary_factors(model) if has_auxiliary(model) else None

    def step() -> None:
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], SETTINGS["max_grad_norm"])
        adamw.step()
        if factors is not None:
            project_(factors, SETTINGS["rho"])

    return step


def ours(_: PeftModel, optimizer: MethodAdamW) -> Callable[[], object]:
    """The method's own step."""
    return optimizer.step


CONTENDERS: dict[str, Contender] = {"per-tensor": per_tensor, "ours": ours}


def measure(method: str, hidden: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of the optimizer's part: contender -> one value a round."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    model: PeftModel = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    )
    settings = {key: SETTINGS[key] for key in settings_of(method)}
    ids = torch.randint(VOCABULARY, (2, 8), device=device)
    models: dict[str, PeftModel] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, contender in CONTENDERS.items():
        models[name] = copy.deepcopy(model).to(device).train()
        torch.manual_seed(1)
        steps[name] = contender(models[name], build_method(method, models[name], **settings))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.disable()
    for round_ in range(WARMUP + rounds):
        gc.collect()
        for name in list(steps) if round_ % 2 else reversed(steps):
            models[name].zero_grad()
            models[name](input_ids=ids, labels=ids).loss.backward()
            taken = _timed(steps[name], device)
            if round_ >= WARMUP:
                seconds[name].append(taken)
    gc.enable()
    first, second = ([*trained(model)] for model in models.values())
    equal = all(map(torch.equal, first, second))
    assert equal or device.type != "cpu", "the contenders did not compute the same"
    return seconds


def trained(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of both adapters."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    values = torch.tensor(ratios)
    draws = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draws].median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _timed(step: Callable[[], object], device: torch.device) -> float:
    # The GPU has nothing else to do meanwhile, and is not waited for: its queue is longer than one step.
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.process_time()
    step()
    return time.process_time() - started


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 64, 256], help="hidden sizes, multiples of 8")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{vars(arguments)}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print("| method | hidden | per-tensor, ms | ours, ms | ours / per-tensor | 95 % interval |")
    print("| --- | --- | --- | --- | --- | --- |")
    for hidden in arguments.hidden:
        for method in ("lora", "bilora"):
            seconds = measure(method, hidden, arguments.rounds, device)
            ratios = [own / other for own, other in zip(seconds["ours"], seconds["per-tensor"], strict=True)]
            low, high = interval(ratios)
            each, own = (statistics.median(seconds[name]) * 1e3 for name in CONTENDERS)
            ratio = statistics.median(ratios)
            print(f"| {method} | {hidden} | {each:.2f} | {own:.2f} | {ratio:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
