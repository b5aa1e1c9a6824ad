"""What one training step costs: Bi-LoRA against plain LoRA of the same primary rank.

A step is zero_grad, forward, backward and the optimizer's update. The contenders take turns, step by step, in one
process, and the order is reversed every round, so that what slows the machine down slows all of them. Each round
gives one ratio per contender; the table holds the ratios' median and its 95 % bootstrap interval, for wall time and,
on the CPU, for the process's own CPU time, which other processes disturb less.

Two baselines, because a fused forward pass is faster than PEFT's whatever the method:
- `peft`: plain LoRA as PEFT ships it, with the product's optimizer;
- `lora`: the product's own, with the same fused arithmetic as Bi-LoRA's.

    python benchmarks/step_time.py --model llama --hidden 1024 --steps 40

With `--device cuda`, or with `--shapes`, it is another comparison, of shapes that people train: see `gpu_steps.py`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from bilora_ray.facts import ADAPTING
from bilora_ray.method import METHODS, LoraAdamW, MethodAdamW, build_method, settings_of

RANK = 8
SETTINGS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "rho": 0.05,
    "auxiliary_rank": RANK,
    "auxiliary_learning_rate": 5e-4,
    "clip": "global",
    "norm": "effective",
    "ascent": "adamw",
    "looksam_every": 5,
    "looksam_alpha": 0.7,
    "bar_alpha": 0.25,
    "esam_beta": 0.5,
    "esam_gamma": 0.5,
    "rwp_space": "weight",
    "seed": 0,
}
# Contenders that are a method with settings of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft": ("lora", {}),
    **{
        f"bilora-{ascent}": ("bilora", {"ascent": ascent, "auxiliary_learning_rate": None})
        for ascent in ("tangent", "half-step")
    },
}
VOCABULARY = 1024
# More than are measured: what changes over a training does so.
TOTAL_STEPS = 1000
Step = Callable[[], Any]


def contender(name: str, base: PreTrainedModel, batch: dict[str, Tensor]) -> Step:
    """One training step of method `name`, or of one of `VARIANTS`, on its own copy of `base`."""
    method, own = VARIANTS.get(name, (name, {}))
    model: PreTrainedModel | PeftModel = copy.deepcopy(base)
    if method in ADAPTING:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    settings = {key: {**SETTINGS, **own}[key] for key in settings_of(method)}
    optimizer = LoraAdamW(model, **settings) if name == "peft" else build_method(method, model, **settings)
    optimizer.total_steps = TOTAL_STEPS
    model.train()

    closure = Passes(model, optimizer, batch)
    return lambda: optimizer.step(closure)


class Passes:
    """The loss of `batch` and its gradient, as the product's training loop gives them: see `RowClosure`."""

    def __init__(self, model: PreTrainedModel | PeftModel, optimizer: MethodAdamW, batch: dict[str, Tensor]) -> None:
        self.model, self.optimizer, self.batch = model, optimizer, batch

    def __call__(self) -> Tensor:
        """The mean loss."""
        self.optimizer.zero_grad()
        loss: Tensor = self.model(**self.batch).loss
        loss.backward()
        return loss

    def by_row(self, rows: Sequence[int] | None = None, gradient: bool = True) -> Tensor:
        """What each row has in it. All are of one length."""
        chosen = range(len(self.batch["labels"])) if rows is None else rows
        if gradient:
            self.optimizer.zero_grad()
        parts = []
        for row in chosen:
            one = {key: tensor[row : row + 1] for key, tensor in self.batch.items()}
            with torch.set_grad_enabled(gradient):
                part = self.model(**one).loss / len(chosen)
            if gradient:
                part.backward()
            parts.append(part.detach())
        return torch.stack(parts)


def build_base(model: str, hidden: int, layers: int) -> PreTrainedModel:
    """A random base model in the proportions of Llama 2, or of T5 1.1 with half of the layers in the decoder."""
    if model == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                intermediate_size=hidden * 11 // 4,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                num_key_value_heads=hidden // 64,
                vocab_size=VOCABULARY,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            d_model=hidden,
            d_ff=hidden * 11 // 4,
            d_kv=64,
            num_heads=hidden // 64,
            num_layers=layers - layers // 2,
            num_decoder_layers=layers // 2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    )


def build_batch(model: str, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens in rows of 128: all of them for llama; for t5, three quarters source and one quarter target."""
    ids = torch.randint(VOCABULARY, (tokens // 128, 128), device=device)
    if model == "llama":
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids[:, :96], "labels": ids[:, 96:].contiguous()}


@dataclass
class Ratio:
    """How much longer `method` takes than `baseline`, by one clock, over paired steps.

    `low` and `high` bound the 95 % bootstrap interval of the median ratio.
    """

    model: str
    method: str
    baseline: str
    clock: str
    median: float
    low: float
    high: float
    method_seconds: float
    baseline_seconds: float
    rounds: int


def measure(
    steps: dict[str, Step], rounds: int, warmup: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step: clock -> contender -> one value a round; the first `warmup` rounds are dropped."""
    seconds: dict[str, dict[str, list[float]]] = {"wall": {n: [] for n in steps}, "cpu": {n: [] for n in steps}}
    gc.disable()
    for round_ in range(warmup + rounds):
        gc.collect()
        names = list(steps) if round_ % 2 == 0 else list(reversed(steps))
        for name in names:
            wall, cpu = _timed(steps[name], device)
            if round_ >= warmup:
                seconds["wall"][name].append(wall)
                seconds["cpu"][name].append(cpu)
    gc.enable()
    if device.type != "cpu":
        del seconds["cpu"]
    return seconds


def _timed(step: Step, device: torch.device) -> tuple[float, float]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(model: str, clock: str, seconds: dict[str, list[float]], baselines: Sequence[str]) -> list[Ratio]:
    """Every contender against every other one that is a baseline."""
    ratios = []
    for method, own in seconds.items():
        for baseline in baselines:
            if method == baseline or baseline not in seconds or (method, baseline) == ("peft", "lora"):
                continue
            values = torch.tensor([a / b for a, b in zip(own, seconds[baseline], strict=True)])
            low, high = _median_interval(values)
            middle, *medians = map(statistics.median, (values.tolist(), own, seconds[baseline]))
            ratios.append(Ratio(model, method, baseline, clock, middle, low, high, *medians, len(own)))
    return ratios


def _median_interval(values: Tensor) -> tuple[float, float]:
    draws = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[draws].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def machine(device: torch.device) -> str:
    """The device, its cores, the load of the last minute and torch's version, in one line."""
    load = f"load {os.getloadavg()[0]:.1f}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {load}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.processor()]
    threads = torch.get_num_threads()
    return f"{names[0]}, {os.cpu_count()} cores, {threads} thread(s) used, torch {torch.__version__}, {load}"


def markdown(ratios: Sequence[Ratio]) -> str:
    """The table."""
    lines = [
        "| model | method / baseline | clock | median ratio | 95 % interval | seconds a step | rounds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in ratios:
        lines.append(
            f"| {r.model} | {r.method} / {r.baseline} | {r.clock} | {r.median:.3f} | {r.low:.3f} to {r.high:.3f} "
            f"| {r.method_seconds:.3f} / {r.baseline_seconds:.3f} "
            f"| {r.rounds} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "t5"), nargs="+", default=["llama", "t5"])
    parser.add_argument(
        "--methods", nargs="+", choices=[*VARIANTS, *METHODS], default=["peft", "lora", "bilora"], help="contenders"
    )
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", help="tokens a step, a multiple of 128 (512); of --shapes 4x1024,4x256,4x64")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each contender")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each contender before those")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base; adapters fp32"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--shapes", help="0.5b,1b,8b, or some of them")
    parser.add_argument("--contenders", default="peft-autocast,lora,bilora,lora-sam", help="of --shapes")
    parser.add_argument("--compile", default="", help="those of --shapes that run with compiled blocks too")
    parser.add_argument("--precisions", default="0.5b:8x512", help="the shape that runs in each precision; '' for none")
    parser.add_argument("--output", help="a file that gets the table of --shapes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if arguments.shapes or device.type == "cuda":
        import gpu_steps

        arguments.shapes = arguments.shapes or "0.5b,1b,8b"
        arguments.tokens = arguments.tokens or "4x1024,4x256,4x64"
        gpu_steps.main(arguments, device, SETTINGS, machine(device))
        return
    ratios: list[Ratio] = []
    for model in arguments.model:
        base = build_base(model, arguments.hidden, arguments.layers).to(device, getattr(torch, arguments.dtype))
        batch = build_batch(model, int(arguments.tokens or 512), device)
        steps = {name: contender(name, base, batch) for name in arguments.methods}
        for clock, seconds in measure(steps, arguments.steps, arguments.warmup, device).items():
            ratios += compare(model, clock, seconds, [name for name in ("peft", "lora") if name in steps])
    if arguments.json:
        print(json.dumps({"machine": machine(device), "ratios": [asdict(ratio) for ratio in ratios]}, indent=2))
    else:
        print(f"{machine(device)}; {vars(arguments)}\n\n{markdown(ratios)}")


if __name__ == "__main__":
    main()
