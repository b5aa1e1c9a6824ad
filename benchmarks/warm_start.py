"""What a search gains by starting from an earlier one of a related task, and what it loses if the task is another one.

Simulated searches of the product's default, TPE and ASHA with four workers, over a learning rate, a radius and a rank.
An earlier study has searched a task; the new one is best near the same settings, or in a corner far away. Told is the
training until a trial that ran to its end is so near to the best (a decade of the learning rate is 1), cold and warm.

    OMP_NUM_THREADS=1 python benchmarks/warm_start.py [--searches 100] [--trials 48]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import optuna

from bilora_ray.config import TrialConfig
from bilora_ray.search.simulated import Curve, Metrics, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study import studies
from bilora_ray.search.study.layout import Layout

SPACE = (
    "model_name_or_path=org/model",
    "task=causal-lm",
    "train_data=org/data",
    "rank={choice: [4, 8, 16]}",
    "rho={low: 0.01, high: 1, log: true}",
    "learning_rate={low: 1e-5, high: 1e-2, log: true}",
)
EVALUATIONS = 9
# Learning rate, radius and rank that are best: of the earlier study's task, of one like it, of two that are not.
EARLIER = (3e-4, 0.1, 8)
TASKS = {"related": (4e-4, 0.07, 8), "unrelated": (5e-3, 0.9, 4), "opposite": (2e-5, 0.012, 16)}
DISTANCES = (0.5, 0.3, 0.2)


def curve_of(rate: float, rho: float, rank: int) -> Curve:
    """A task whose trials are the worse the farther their settings are from these."""

    def curve(config: TrialConfig) -> Sequence[Metrics]:
        off = abs(math.log10(config.learning_rate / rate)) + 0.5 * abs(math.log10(config.rho / rho))
        off += 0.1 * abs(math.log2(config.rank / rank))
        return [
            {"step": step, "max_steps": EVALUATIONS, "eval_loss": off + 1 / step, "train_runtime": float(step)}
            for step in range(1, EVALUATIONS + 1)
        ]

    return curve


def search(layout: Layout, name: str, curve: Curve, trials: int, seed: int, sources: str = "") -> list[float]:
    """Seconds of training until each of the distances, and the distance at the end."""
    study = (f"study.name={name}", f"study.num_trials={trials}", f"study.seed={seed}", f"study.warm_start=[{sources}]")
    opened = studies.open_study(load_space(None, [*SPACE, *study]), layout, {})
    reached, best, consumed = [math.inf] * len(DISTANCES), math.inf, 0.0
    for moment in simulate(opened, curve):
        consumed += moment.seconds
        if moment.metrics["step"] == EVALUATIONS:
            best = min(best, moment.metrics["eval_loss"] - 1 / EVALUATIONS)
            reached = [min(at, consumed) if best <= far else at for at, far in zip(reached, DISTANCES, strict=True)]
    opened.release()
    return [*reached, best]


def interval(cold: np.ndarray, warm: np.ndarray) -> str:
    """Warm over cold, of medians, with what holds it in 95 of 100 resamples."""
    random = np.random.default_rng(0)
    drawn = [np.median(random.choice(warm, len(warm))) / np.median(random.choice(cold, len(cold))) for _ in range(2000)]
    low, high = np.nanquantile(drawn, [0.025, 0.975], method="nearest")
    return f"{np.median(warm) / np.median(cold):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Print a table, a line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=100)
    parser.add_argument("--trials", type=int, default=48)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = optuna.storages.InMemoryStorage()
    known = {"open_storage": lambda _: storage, "read_storage": lambda _: storage}
    known["Looks"] = lambda storage: storage
    known["study_names"] = lambda _: optuna.get_all_study_names(storage)
    print("| task | " + " | ".join(f"seconds to {far}, cold | warm / cold" for far in DISTANCES), end=" | ")
    print("distance at the end, cold | warm / cold |\n| --- |" + " ---: |" * (2 * len(DISTANCES) + 2), flush=True)
    with tempfile.TemporaryDirectory() as folder, patch.multiple(studies, **known):
        layout = Layout(Path(folder))
        search(layout, "earlier", curve_of(*EARLIER), arguments.trials, seed=1)
        for task, best in TASKS.items():
            curve, seeds = curve_of(*best), range(arguments.searches)
            cold = np.array([search(layout, f"{task}-cold-{s}", curve, arguments.trials, s) for s in seeds])
            warm = np.array([search(layout, f"{task}-warm-{s}", curve, arguments.trials, s, "earlier") for s in seeds])
            cells = [f"{np.median(c):.3g} | {interval(c, w)}" for c, w in zip(cold.T, warm.T, strict=True)]
            print(f"| {task} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
