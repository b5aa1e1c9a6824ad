"""Whether early stops pay where two things are looked for: the hypervolume at equal cost, with and without them.

The real search code runs on trials that are made up, on a simulated clock (`search/simulated.py`): a loss that falls as
a power of the training done, lower and later for a larger rank, and a time that grows with the rank and the batch. Each
search may spend the same seconds of training; what it found until then is the front of its complete trials.

    python benchmarks/objectives.py --searches 50
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import optuna

from bilora_ray.config import TrialConfig
from bilora_ray.records import Status
from bilora_ray.search.simulated import Metrics, Moment, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.front import hypervolume
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.study import SearchStudy

SPACE = (
    "model_name_or_path=org/model",
    "task=causal-lm",
    "train_data=org/data",
    "learning_rate={low: 1e-5, high: 1e-2, log: true}",
    "rank={choice: [2, 4, 8, 16, 32, 64]}",
    "rho={low: 0.01, high: 0.5, log: true}",
    "per_device_train_batch_size=8",
    "study.name=s",
    "study.objectives=[{metric: eval_loss}, {metric: train_runtime}]",
)
STEPS, EVERY = 27, 3
# The loss and the seconds that a trial is to be below to be worth anything: a poor one's, and the slowest one's.
REFERENCE = (1.5, 280.0)
WORKERS = 4
RESAMPLES = 10_000


def curve(config: TrialConfig) -> list[Metrics]:
    """All evaluations of a trial: what is made up here is smooth in the settings, with noise of its own."""
    noise = random.Random(repr((config.learning_rate, config.rank, config.rho)))
    best_rate = 2e-3 / math.sqrt(config.rank)
    off = abs(math.log10(config.learning_rate / best_rate))
    floor = 0.6 + 0.7 / math.sqrt(config.rank) + 0.35 * off**2 + 0.12 * abs(math.log10(config.rho / 0.08)) ** 2
    floor += noise.gauss(0.0, 0.02)
    a_step = (1.5 + config.rank / 8) * noise.uniform(0.95, 1.05)
    fast = 0.5 + 0.3 / (1 + off)
    return [
        {
            "step": step,
            "max_steps": STEPS,
            "eval_loss": floor + 2.0 * step**-fast + noise.gauss(0.0, 0.01),
            "train_runtime": a_step * step,
        }
        for step in range(EVERY, STEPS + 1, EVERY)
    ]


class Spending(SearchStudy):
    """A study that begins no trial once `left_s` seconds of training are spent."""

    left_s = math.inf

    def next_trials(self) -> list[int]:
        """As in a search."""
        return super().next_trials() if self.left_s > 0 else []

    def report(self, number: int, metrics: Metrics) -> Status:
        """As in a search."""
        self.left_s -= metrics["train_runtime"] * EVERY / metrics["step"]
        return super().report(number, metrics)


def searched(seed: int, scheduler: str, sampler: str, budget: float) -> list[Moment]:
    """What happened in one search."""
    given = (f"study.scheduler={scheduler}", f"study.sampler={sampler}", f"study.seed={seed}")
    with tempfile.TemporaryDirectory() as folder:
        space = load_space(None, [*SPACE, *given, "study.num_trials=1000"])
        layout = Layout(Path(folder))
        layout.make(space.study.name)
        # In memory the same is decided, in a thirtieth of the time.
        study = Spending(optuna.create_study(study_name="s", directions=["minimize", "minimize"]), space, layout)
        study.left_s = budget
        try:
            return simulate(study, curve, WORKERS)
        finally:
            study.release()


def found_at(moments: Sequence[Moment], budgets: Sequence[float]) -> list[float]:
    """The hypervolume of the complete trials when so many seconds of training were spent, for each of `budgets`."""
    spent, known, losses, volumes = 0.0, dict[int, list[Metrics]](), list[tuple[float, float]](), []
    waiting = list(budgets)
    for moment in moments:
        spent += moment.seconds
        while waiting and spent > waiting[0]:
            volumes.append(hypervolume(losses, REFERENCE))
            waiting.pop(0)
        known.setdefault(moment.number, []).append(moment.metrics)
        if moment.status is Status.COMPLETE:
            best = min(known[moment.number], key=lambda metrics: metrics["eval_loss"])
            losses.append((best["eval_loss"], best["train_runtime"]))
    return volumes + [hypervolume(losses, REFERENCE)] * len(waiting)


def compared(seed: int, sampler: str, budgets: Sequence[float]) -> dict[str, list[float]]:
    """Scheduler -> the hypervolumes of one search at the `budgets`."""
    return {
        scheduler: found_at(searched(seed, scheduler, sampler, max(budgets)), budgets) for scheduler in ("none", "asha")
    }


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def main() -> None:
    """Print the table."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[500.0, 1000.0, 2000.0, 4000.0])
    chosen = parser.parse_args()
    print(f"Hypervolume below a loss of {REFERENCE[0]:g} and {REFERENCE[1]:g} s, {chosen.searches} searches.\n")
    print("| sampler | seconds of training | no early stops | asha | asha less none, 95 % | ahead in |")
    print("| --- | ---: | ---: | ---: | --- | ---: |")
    for sampler in chosen.samplers:
        with ProcessPoolExecutor(chosen.processes) as pool:
            work = partial(compared, sampler=sampler, budgets=chosen.budgets)
            results = list(pool.map(work, range(chosen.searches)))
        for index, budget in enumerate(chosen.budgets):
            none, asha = (np.array([result[key][index] for result in results]) for key in ("none", "asha"))
            mean, low, high = interval(asha - none)
            ahead = float(np.mean(asha > none))
            told = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
            print(
                f"| {sampler} | {budget:g} | {none.mean():.1f} | {asha.mean():.1f} | {told} | {ahead:.0%} |", flush=True
            )


if __name__ == "__main__":
    main()
