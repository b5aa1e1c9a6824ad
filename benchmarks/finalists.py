"""Whether what a search reports of its winner is what the winner is worth, where that is known.

Searches of the real code over trials whose true value is planted: a surface, or one value for all settings, and noise
of the seed, of which a part is shared by all trials of a seed. Three figures are compared with the truth, which is the
mean over all seeds: the best single run of a search; the winner's mean on fresh seeds; and what is reported.

    python benchmarks/finalists.py [--studies 100] [--finalists 3] [--seeds 3] [--jobs 2]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import optuna

from bilora_ray.config import TrialConfig
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import choose, space_of, told_by
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.study import SearchStudy

SPACE = (
    *("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "study.name=s", "max_steps=9"),
    *("learning_rate={low: 5e-5, high: 1e-3, log: true}", "rank={choice: [4, 8, 16]}", "rho={low: 0.01, high: 0.2}"),
)
# Of runs of one setting; the share of its variance that all runs of a seed have in common.
NOISE, COMMON = 0.02, 0.3
STEPS = (1, 3, 9)


@dataclass(frozen=True)
class Told:
    """Of one study, by how much each figure is too high, and whether its interval holds the truth."""

    single: float
    mean: float
    score: float
    single_holds: bool
    mean_holds: bool
    score_holds: bool
    gained: float


def truth(planted: str, config: TrialConfig) -> float:
    """The mean loss of trials with these settings, over all seeds."""
    if planted == "nothing":
        return 1.0
    at = math.log(config.learning_rate / 5e-5) / math.log(1e-3 / 5e-5)
    return 1.0 + 0.2 * (at - 0.6) ** 2 + {4: 0.02, 8: 0.01, 16: 0.0}[config.rank] + 0.5 * (config.rho - 0.08) ** 2


def curve(planted: str, study: int, config: TrialConfig) -> list[Metrics]:
    """What a trial measures; the last evaluation is the best."""
    common = math.sqrt(COMMON) * Random(f"{study} {config.seed}").gauss()
    own = math.sqrt(1 - COMMON) * Random(f"{study} {config.seed} {config.model_dump_json()}").gauss()
    loss = truth(planted, config) + NOISE * (common + own)
    return [
        {"step": step, "max_steps": 9, "eval_loss": loss + 1 / step - 1 / 9, "train_runtime": float(step)}
        for step in STEPS
    ]


def in_memory(space: Space, layout: Layout) -> SearchStudy:
    """A study of `space` without a database, whose writes would be most of the time."""
    layout.make(space.study.name)
    study = optuna.create_study(study_name=space.study.name)
    for point in space.points_to_evaluate:
        study.enqueue_trial(point)
    return SearchStudy(study, space, layout)


def judged(planted: str, trials: int, finalists: int, seeds: int, number: int) -> Told:
    """One search, and its finalists."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    asked = (f"study.num_trials={trials}", f"study.finalists={finalists}", f"study.finalist_seeds={seeds}")
    known = partial(curve, planted, number)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        study = in_memory(load_space(None, [*SPACE, *asked, f"study.seed={number}"]), layout)
        simulate(study, known)
        chosen = choose(study)
        finals = in_memory(space_of(study, chosen), layout)
        simulate(finals, known)
        found, best = told_by(study, finals, chosen).verdict, study.best()
        study.release()
        finals.release()
    assert found is not None
    assert best is not None
    assert best.value is not None
    winner = found.winner
    of_best, of_winner = truth(planted, study.config(best.number)), truth(planted, study.config(winner.trial))
    return Told(
        single=best.value - of_best,
        mean=winner.mean - of_winner,
        score=found.score - of_winner,
        single_holds=abs(best.value - of_best) <= 1.96 * NOISE,
        mean_holds=is_in(winner.low, of_winner, winner.high),
        score_holds=is_in(found.low, of_winner, found.high),
        gained=of_best - of_winner,
    )


def is_in(low: float | None, value: float, high: float | None) -> bool:
    """Whether an interval holds `value`."""
    return low is not None and high is not None and low <= value <= high


def row(planted: str, trials: int, what: str, errors: list[float], holds: list[bool]) -> str:
    """A line of the table, in units of the noise."""
    mean, half = fmean(errors) / NOISE, 1.96 * stdev(errors) / math.sqrt(len(errors)) / NOISE
    too_good = sum(error < 0 for error in errors)
    return f"| {planted} | {trials} | {what} | {mean:+.2f} ± {half:.2f} | {too_good} | {sum(holds)} of {len(holds)} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    print(f"{given.finalists} finalists on {given.seeds} seeds each, {given.studies} studies a line.\n")
    print("| planted | trials | told of the winner | error / noise of a run | too good in | interval holds the truth |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    gained = []
    with ProcessPoolExecutor(given.jobs) as pool:
        for planted, trials in (("nothing", 20), ("a surface", 20), ("a surface", 40)):
            told = list(pool.map(partial(judged, planted, trials, given.finalists, given.seeds), range(given.studies)))
            of = partial(row, planted, trials)
            print(of("best single run", [t.single for t in told], [t.single_holds for t in told]))
            print(of("winner's own mean", [t.mean for t in told], [t.mean_holds for t in told]))
            print(of("reported score", [t.score for t in told], [t.score_holds for t in told]), flush=True)
            truly = [t.gained / NOISE for t in told]
            half = 1.96 * stdev(truly) / math.sqrt(len(truly))
            gained.append(f"{planted}, {trials} trials: {fmean(truly):+.2f} ± {half:.2f}")
    print("\nThe winner is truly better than the settings of the best single run, in the noise of a run, by")
    print("\n".join(gained))


if __name__ == "__main__":
    main()
