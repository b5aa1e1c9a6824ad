"""How often `show` names the setting that mattered, and how often one where none did.

Searches without training: the proposals (TPE) and early stops of the product, with values that are noise, or that one
setting decides to nine tenths of their variance. A setting is found if it is the first that is shown.

    python benchmarks/importances.py [--studies 100]
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from bilora_ray.search.space import Space, Value
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.importances import Importances, importances_of
from bilora_ray.search.study.samplers import propose

SETTINGS = {
    "learning_rate": "{low: 5e-5, high: 1e-3, log: true}",
    "rank": "{choice: [4, 8, 16]}",
    "rho": "{low: 0.005, high: 0.5, log: true}",
    "auxiliary_rank": "{low: 2, high: 16}",
    "warmup_ratio": "{low: 0, high: 0.2}",
}
PLANTED = 0.9
EVALUATIONS, GRACE_PERIOD = 10, 2
SIZES = (12, 20, 40)


def space_of(num_trials: int, num_settings: int, seed: int) -> Space:
    """A space of the first `num_settings` of `SETTINGS`."""
    trial = {"model_name_or_path": "org/model", "task": "causal-lm", "train_data": "org/data"}
    trial |= dict(itertools.islice(SETTINGS.items(), num_settings))
    study = {"name": "s", "num_trials": num_trials, "seed": seed}
    sections = {"study": study, "trial": trial}
    return load_space(None, [f"{name}.{key}={v}" for name, values in sections.items() for key, v in values.items()])


def effect(planted: str, settings: dict[str, Value], random_best: float) -> float:
    """What the planted setting adds to the loss; of variance 1 where settings are drawn uniformly."""
    if planted == "learning_rate":
        at = math.log(float(settings["learning_rate"]) / 5e-5) / math.log(1e-3 / 5e-5)
        everywhere = (np.linspace(0, 1, 1001) - random_best) ** 2
        return float((at - random_best) ** 2 / everywhere.std())
    if planted == "rank":
        return math.sqrt(1.5) * {4: 1, 8: 0, 16: -1}[int(settings["rank"])]
    return 0.0


def search(planted: str, num_trials: int, num_settings: int, seed: int) -> Importances:
    """What mattered in one search; `planted` is "noise" or the setting that decides."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    random = np.random.default_rng([seed, num_trials, num_settings])
    space = space_of(num_trials, num_settings, seed)
    study = optuna.create_study(pruner=SuccessiveHalvingPruner(min_resource=GRACE_PERIOD, reduction_factor=3))
    best = random.uniform()
    noise = 1.0 if planted == "noise" else 1 - PLANTED
    for number in range(num_trials):
        study.sampler = RandomSampler(seed=0)
        study.ask()
        trial = propose(study, space, number)
        level = math.sqrt(PLANTED) * effect(planted, trial.params, best) + random.normal(0, math.sqrt(0.7 * noise))
        state = TrialState.COMPLETE
        for step in range(1, EVALUATIONS + 1):
            trial.report(30 * math.exp(-step / 3) + level + random.normal(0, math.sqrt(0.3 * noise)), step)
            if trial.should_prune():
                state = TrialState.PRUNED
                break
        study.tell(trial, level if state == TrialState.COMPLETE else None, state=state)
    return importances_of(study.get_trials(deepcopy=False), space.distributions, lambda _: 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100)
    count = parser.parse_args().studies
    print("| planted | trials | settings searched | studies | found first | another named | nothing shown |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with ProcessPoolExecutor() as processes:
        for planted, num_trials, num_settings in itertools.product(
            ("noise", "learning_rate", "rank"), SIZES, (3, 4, 5)
        ):
            results = list(processes.map(partial(search, planted, num_trials, num_settings), range(count)))
            shown = [list(result.shares) for result in results]
            found = sum(names[:1] == [planted] for names in shown)
            others = sum(bool(set(names) - {planted}) for names in shown)
            row = (planted, num_trials, num_settings, count, found, others, shown.count([]))
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
