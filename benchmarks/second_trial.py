"""What a trial takes until its first step in a process that has had one: with the base kept, and with it loaded again.

    OMP_NUM_THREADS=1 python benchmarks/second_trial.py [--rounds 9]

Both are measured in turn, in process CPU seconds: the model that comes with bilora-ray, and a Llama-shaped one of a
billion bytes with random weights. What the disk has is in the system's memory by then, so that a large model on a slow
disk gains more.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from bilora_ray.config import TrialConfig
from bilora_ray.paths import loadable
from bilora_ray.quiet import quiet
from bilora_ray.training.compute import bases
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run

SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"
SAMPLED = {"rank": 8, "auxiliary_rank": 8, "rho": 0.05, "learning_rate": 4e-3}


def seconds(config: TrialConfig, keep: bool) -> tuple[float, float]:
    """CPU and wall seconds of a trial's start."""
    if not keep:
        bases._kept.clear()
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall = time.process_time(), time.perf_counter()
        run = Run(config, TrialFolder(Path(folder)), keep_base=True)
        found = time.process_time() - cpu, time.perf_counter() - wall
    run.base.end()
    return found


@contextmanager
def configs() -> Iterator[dict[str, TrialConfig]]:
    settings = yaml.safe_load(SPACE.read_text(encoding="utf-8"))["trial"] | SAMPLED
    small = TrialConfig(**settings)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(loadable(small.model_name_or_path), folder, dirs_exist_ok=True)
        shape = AutoConfig.from_pretrained(folder)
        wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
        shape.update(wide | {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
        model.to_empty(device="cpu").apply(lambda module: [p.data.normal_(0, 0.02) for p in module.parameters(False)])
        model.save_pretrained(folder)
        size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e9
        del model
        yield {"quickstart": small, f"{size:.1f} GB": small.model_copy(update={"model_name_or_path": folder})}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    quiet()
    gc.freeze()  # as a trial's process does once it has imported all
    print("| base | loaded again, CPU s | kept, CPU s | ratio of medians | wall s |\n| --- | --- | --- | --- | --- |")
    with configs() as models:
        for name, config in models.items():
            seconds(config, keep=False)
            taken = [(seconds(config, keep=False), seconds(config, keep=True)) for _ in range(rounds)]
            again, kept = ([pair[side] for pair in taken] for side in (0, 1))
            cpu = [statistics.median(one[0] for one in side) for side in (again, kept)]
            wall = [statistics.median(one[1] for one in side) for side in (again, kept)]
            low, high = ([f"{pick(one[0] for one in side):.3f}" for side in (again, kept)] for pick in (min, max))
            cells = [f"{cpu[side]:.3f} ({low[side]} to {high[side]})" for side in (0, 1)]
            print(f"| {name} | {cells[0]} | {cells[1]} | {cpu[1] / cpu[0]:.2f} | {wall[0]:.2f}, {wall[1]:.2f} |")


if __name__ == "__main__":
    main()
