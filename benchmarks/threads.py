"""How long a training step takes on how many threads, on this machine as busy as it is, or busier.

    python benchmarks/threads.py [--busy 2] [--rounds 5]

Steps on each number of threads take turns, so that all of them meet the same neighbours. A step's time is told as a
ratio to that on as many threads as torch takes by itself; below it stands how many threads `bilora_ray.threads` would
take. With --busy so many processes compute beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.pop("OMP_NUM_THREADS", None)

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bilora_ray.threads import free_processors

SPIN = "while True: sum(range(10**6))"


def builtin() -> Callable[[], None]:
    """A step of the quickstart: 16 rows of 96 tokens."""
    from bilora_ray import builtin as package

    return _step(AutoModelForCausalLM.from_pretrained(f"{package.__path__[0]}/quickstart/model"), 16, 96)


def llama() -> Callable[[], None]:
    """A step of a Llama of hidden size 1024, of one block: 4 rows of 128 tokens."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=16)
    config.vocab_size = 1000
    return _step(LlamaForCausalLM(config), 4, 128)


def _step(model: torch.nn.Module, rows: int, tokens: int) -> Callable[[], None]:
    ids = torch.randint(0, 100, (rows, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    """Read the options, and print the ratios."""
    parser = argparse.ArgumentParser(description="Time steps on some numbers of threads, interleaved.")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it  [0]")
    parser.add_argument("--rounds", type=int, default=5, help="steps on each number of threads  [5]")
    options = parser.parse_args()
    by_itself = torch.get_num_threads()
    counts = sorted({1, max(1, by_itself // 2), by_itself})
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(options.busy)]
    try:
        before = os.getloadavg()[0]
        for name, step in (("builtin:quickstart/model", builtin()), ("Llama, hidden 1024", llama())):
            times: dict[int, list[float]] = {count: [] for count in counts}
            for turn in range(options.rounds + 1):
                for count in counts:
                    torch.set_num_threads(count)
                    started = time.perf_counter()
                    step()
                    if turn:
                        times[count].append(time.perf_counter() - started)
            base = statistics.median(times[by_itself])
            for count, taken in times.items():
                middle = statistics.median(taken)
                print(f"{name:<26} {count:>3} threads  {1000 * middle:8.1f} ms a step  {middle / base:5.2f}")
        print(
            f"torch takes {by_itself}, bilora-ray {free_processors()}; load {before:.1f} of {os.cpu_count()} processors"
        )
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    main()
