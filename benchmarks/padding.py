"""What padding costs a training step: rows cut into passes as they come, against rows of like length together.

Rows of GSM8K, a small Llama with random weights and Bi-LoRA on all its linear layers, one thread. The contenders take
turns, step by step, over the same rows; what is compared is the process's own CPU time, which other processes disturb
least. `as they come` is what 0.1.0 did: per_device_train_batch_size rows a pass in the order of the epoch.

    python benchmarks/padding.py --rows gsm8k/train.jsonl --hidden 256
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bilora_ray.method import build_method, settings_of
from bilora_ray.training.compute.cutting import Budget, Sides, cut, positions
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.tasks.base import padded, stacked

SETTINGS = {"learning_rate": 5e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "rho": 0.05, "auxiliary_rank": 8}
VOCABULARY = 4096
# Rows of a pass, and passes of a step, as a user asks for them.
SHAPES = ((4, 32), (8, 4), (32, 1), (8, 1))
Cutter = Callable[[Sequence[Sides], int], list[list[int]]]


def as_they_come(sides: Sequence[Sides], rows: int) -> list[list[int]]:
    """As 0.1.0 did."""
    return [list(range(start, min(start + rows, len(sides)))) for start in range(0, len(sides), rows)]


def by_length(sides: Sequence[Sides], rows: int) -> list[list[int]]:
    """As the training loop does, by default."""
    return cut(sides, Budget(rows), "cpu")


CUTTERS: dict[str, Cutter] = {"as they come": as_they_come, "by length": by_length}


def read(path: Path) -> list[array[int]]:
    """Token ids of each row: byte-pair encoding that these rows themselves were split by."""
    texts = [" ".join(json.loads(line).values()) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    return [array("i", encoding.ids) for encoding in tokenizer.encode_batch(texts)]


def stepper(hidden: int) -> Callable[[Sequence[Sequence[array[int]]]], float]:
    """Takes the passes of one step; gives the seconds of CPU time that it took."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": 4}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape, **heads)),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    settings = {"auxiliary_learning_rate": None, **SETTINGS}
    optimizer = build_method("bilora", model, **{key: settings[key] for key in settings_of("bilora")})
    model.train()

    def step(passes: Sequence[Sequence[array[int]]]) -> float:
        count = sum(map(len, passes))

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for rows in passes:
                loss = model(**padded(rows, 0), labels=stacked(rows, IGNORED)).loss * (len(rows) / count)
                loss.backward()
                total += loss.detach()
            return total

        begun = time.process_time()
        optimizer.step(closure)
        return time.process_time() - begun

    return step


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines with a question and an answer each")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each contender and shape")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, step, random = read(arguments.rows), stepper(arguments.hidden), Random(0)
    step([rows[:2]])
    print(f"{len(rows)} rows of {sum(map(len, rows)) / len(rows):.0f} tokens, at the most {max(map(len, rows))}\n")
    print("| rows x passes | contender | passes | positions / tokens | CPU ms a step | x as they come |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size, accumulated in SHAPES:
        seconds: dict[str, list[float]] = {name: [] for name in CUTTERS}
        held, passes = dict.fromkeys(CUTTERS, 0), dict.fromkeys(CUTTERS, 0)
        tokens = 0
        for number in range(arguments.steps):
            drawn = random.sample(rows, size * accumulated)
            tokens += sum(map(len, drawn))
            sides = [(len(row),) for row in drawn]
            for name in CUTTERS if number % 2 else reversed(CUTTERS):
                parts = CUTTERS[name](sides, size)
                held[name] += sum(positions([sides[row] for row in part]) for part in parts)
                passes[name] += len(parts)
                seconds[name].append(step([[drawn[row] for row in part] for part in parts]))
        for name, own in seconds.items():
            ratios = [one / other for one, other in zip(own, seconds["as they come"], strict=True)]
            print(
                f"| {size} x {accumulated} | {name} | {passes[name] / arguments.steps:.1f} | {held[name] / tokens:.3f} "
                f"| {statistics.median(own) * 1e3:.0f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) |"
            )


if __name__ == "__main__":
    main()
