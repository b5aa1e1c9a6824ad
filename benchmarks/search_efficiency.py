"""How much training a search needs to find good settings, and how much Ray Tune with Optuna and ASHA needs.

Every search runs on the table that `quickstart_table.py` recorded: what its trials measure and how long they take was
measured once, of real trials, and is read off between the points of the grid, linearly in the logarithms of the
learning rate and of the radius. Nothing else is made up: the proposals and the early stops are those of the product,
and of the rival, whose searcher and scheduler are Ray Tune's own, with their defaults, on the same table and the same
clock with four workers. A search ends when it has consumed as many seconds of training as `--trials` whole trials take.

What counts is the regret: how far the best value of a trial that ran to its end is from the best of the table.

    OMP_NUM_THREADS=1 python benchmarks/search_efficiency.py [--searches 50] [--trials 64] [--jobs 2] [--output FOLDER]

The output folder keeps every search, so that the command goes on where it was stopped, and gets `search_efficiency.md`
and `search_efficiency.png`.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

HERE = Path(__file__).resolve()
TABLE = HERE.parent / "data" / "quickstart_table.csv"
CHOICES, RANGES = ("method", "rank", "auxiliary_rank"), ("rho", "learning_rate")
MEASURED = ("eval_loss", "eval_exact_match", "seconds")
JUDGES = {"eval_loss": False, "eval_exact_match": True}
WORKERS = 4
# At these shares of a search's seconds its regret is told.
BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
# What the quickstart's file tries first, before any of this was measured; and a belief that is as wrong as it can be.
PRIORS = ("3e-4, high: 3e-2, log: true, prior: {mean: 4e-3, sigma: 2x}", "{mean: 0.05, sigma: 3x}")
WRONG = ("3e-4, high: 3e-2, log: true, prior: {mean: 3e-2, sigma: 2x}", "{mean: 1.0, sigma: 3x}")


def believing(learning_rate: str, rho: str) -> tuple[str, ...]:
    """The two ranges, with what is believed of them."""
    return f"learning_rate={{low: {learning_rate}}}", f"rho={{low: 0.005, high: 1.0, log: true, prior: {rho}}}"


# What the quickstart's file tries first.
POINT = {"method": "bilora", "rank": 8, "auxiliary_rank": 8, "rho": 0.05, "learning_rate": 4e-3}
# At each rung one of three trials goes on, and not one of two.
THIRDS = ("study.reduction_factor=3",)

# A way to search -> what it has beside the defaults of a study.
WAYS: dict[str, tuple[str, ...]] = {
    "random": ("study.sampler=random", "study.scheduler=none"),
    "tpe": ("study.scheduler=none",),
    "tpe + asha (the default)": (),
    "tpe + asha + priors": believing(*PRIORS),
    "tpe + asha + wrong priors": believing(*WRONG),
    "tpe + asha, the quickstart's file": (f"study.points_to_evaluate=[{json.dumps(POINT)}]",),
    "tpe + asha in thirds": THIRDS,
    "tpe + asha in thirds, from a ninth on": (*THIRDS, "study.grace_period=20"),
    "tpe + asha in thirds + priors": (*THIRDS, *believing(*PRIORS)),
    "tpe + hyperband": ("study.scheduler=hyperband",),
    "tpe + median": ("study.scheduler=median",),
    "gp": ("study.sampler=gp", "study.scheduler=none"),
    "gp + asha": ("study.sampler=gp",),
    "cmaes": ("study.sampler=cmaes", "study.scheduler=none"),
    "random + asha": ("study.sampler=random",),
}
# A way of Ray Tune -> of how many trials one goes on (4 by default), and its first rung as a share of a trial. As the
# quickstart's file it runs that one's point first, too.
RIVALS: dict[str, tuple[int, float]] = {
    "Ray Tune: OptunaSearch + ASHA": (4, 1 / 3),
    "Ray Tune: in halves, from a quarter on": (2, 1 / 4),
    "Ray Tune: in thirds": (3, 1 / 3),
    "Ray Tune: in thirds, from a ninth on": (3, 1 / 9),
    "Ray Tune: as the quickstart's file": (2, 1 / 4),
}
DEFAULT, RANDOM, RIVAL = "tpe + asha (the default)", "random", "Ray Tune: OptunaSearch + ASHA"
# What a sampler does not search: it has the last of these choices, and so an easier space than the others.
NOT_SEARCHED = {"gp": ("method",), "cmaes": CHOICES}


@dataclass(frozen=True)
class Table:
    """Real trials on a grid.

    Attributes:
        radii: of the grid, ascending.
        rates: the learning rates, ascending.
        choices: setting -> its values.
        steps: at which a trial is evaluated.
        curves: method, rank, auxiliary rank -> radius, learning rate, evaluation, MEASURED. Plain LoRA has no
            auxiliary, and the same at each radius.
    """

    radii: np.ndarray
    rates: np.ndarray
    choices: Mapping[str, Sequence[Any]]
    steps: tuple[int, ...]
    curves: Mapping[tuple[str, int, int | None], np.ndarray]

    def curve(self, settings: Mapping[str, Any]) -> list[dict[str, float]]:
        """All evaluations of a trial with `settings`."""
        of_lora = settings["method"] == "lora"
        grid = self.curves[settings["method"], settings["rank"], None if of_lora else settings["auxiliary_rank"]]
        found = _between(self.rates, settings["learning_rate"], np.moveaxis(grid, 1, 0))
        found = found[0] if of_lora else _between(self.radii, settings["rho"], found)
        told = [dict(zip(MEASURED, map(float, row), strict=True)) for row in found]
        return [
            {"step": step, "max_steps": self.steps[-1], "train_runtime": one.pop("seconds"), **one}
            for step, one in zip(self.steps, told, strict=True)
        ]

    def best(self, judge: str) -> float:
        """The best value of any trial: at a point of the grid, since it is linear between them."""
        column, best = MEASURED.index(judge), max if JUDGES[judge] else min
        return float(best(best(grid[..., column].ravel()) for grid in self.curves.values()))

    def seconds(self) -> float:
        """What a whole trial takes, on average."""
        return float(np.mean([grid[..., -1, -1].mean() for grid in self.curves.values()]))


def _between(points: np.ndarray, at: float, values: np.ndarray) -> np.ndarray:
    """`values`, given at `points` of their first axis, at another point; linear in its logarithm."""
    place = np.interp(math.log(at), np.log(points), np.arange(len(points)))
    low = min(int(place), len(points) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


@lru_cache
def read_table(file: Path) -> Table:
    """The table in `file`, where a trial that diverged measures the worst of all. SystemExit if one is missing."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            found.setdefault(tuple(row[name] for name in (*CHOICES, *RANGES)), []).append(row)
    ranks, auxiliaries = ({int(key[place]) for key in found if key[place]} for place in (1, 2))
    radii, rates = (sorted({float(key[place]) for key in found if key[place]}) for place in (3, 4))
    told = {(*key[:3], *(float(number) if number else 0.0 for number in key[3:])): rows for key, rows in found.items()}
    longest = max(found.values(), key=len)
    steps = tuple(int(row["step"]) for row in longest)
    every = np.array([[[float(row[name]) for name in MEASURED] for row in rows] for rows in found.values()
                      if len(rows) == len(steps)])  # fmt: skip
    worst = [every[..., 0].max(), every[..., 1].min()]

    def trial(method: str, rank: int, auxiliary: int | None, rho: float, rate: float) -> np.ndarray:
        key = (method, str(rank), "" if auxiliary is None else str(auxiliary), rho, rate)
        if key not in told:
            raise SystemExit(f"{file}: has no trial {key}; quickstart_table.py goes on")
        known = [[float(row[name]) for name in MEASURED] for row in told[key]]
        pace = known[-1][-1] / len(known)
        known += [[*worst, pace * (place + 1)] for place in range(len(known), len(steps))]
        return np.array(known)

    curves: dict[tuple[str, int, int | None], np.ndarray] = {}
    for rank in ranks:
        curves["lora", rank, None] = np.array([[trial("lora", rank, None, 0.0, rate) for rate in rates]])
        for auxiliary in auxiliaries:
            curves["bilora", rank, auxiliary] = np.array(
                [[trial("bilora", rank, auxiliary, rho, rate) for rate in rates] for rho in radii]
            )
    choices = {"method": ["lora", "bilora"], "rank": sorted(ranks), "auxiliary_rank": sorted(auxiliaries)}
    return Table(np.array(radii), np.array(rates), choices, steps, curves)


@dataclass(frozen=True)
class Told:
    """One evaluation of a search: the seconds that it took, its metrics, whether its trial ran to its end."""

    trial: int
    seconds: float
    metrics: Mapping[str, float]
    complete: bool


def ours(
    table: Table, judge: str, overrides: Sequence[str], seed: int, num_trials: int, folder: Path
) -> Iterator[Told]:
    """A search of the product."""
    import optuna

    from bilora_ray.records import Status
    from bilora_ray.search.simulated import moments
    from bilora_ray.search.space_file import load_space
    from bilora_ray.search.study import studies
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.samplers import check_sampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    keys = [override.partition("=")[0] for override in overrides]
    searched = {name: f"{{choice: {json.dumps(values)}}}" for name, values in table.choices.items()}
    for name, values in (("rho", table.radii), ("learning_rate", table.rates)):
        searched[name] = f"{{low: {float(values[0])!r}, high: {float(values[-1])!r}, log: true}}"
    task = ["model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "validation_data=org/validation"]
    task += [f"max_steps={table.steps[-1]}", f"metric={judge}"]
    if judge != "eval_loss":
        task += ["predict_with_generate=true"]
    study = ["study.name=s", f"study.num_trials={num_trials}", f"study.seed={seed}"]
    given = [f"{name}={value}" for name, value in searched.items() if name not in keys]
    space = load_space(None, [*task, *study, *given, *overrides])
    check_sampler(space)
    # SQLite would be nine tenths of the time, and decides nothing.
    in_memory = {"open_storage": lambda _: optuna.storages.InMemoryStorage(), "Looks": lambda storage: storage}
    with patch.multiple(studies, **in_memory):
        opened = studies.open_study(space, Layout(folder), {})
    try:
        for moment in moments(
            opened, lambda config: table.curve(config.model_dump(include={*CHOICES, *RANGES})), WORKERS
        ):
            yield Told(moment.number, moment.seconds, moment.metrics, moment.status is Status.COMPLETE)
    finally:
        opened.release()


def rivals(table: Table, judge: str, way: str, seed: int, num_trials: int) -> Iterator[Told]:
    """A search of Ray Tune: its searcher and scheduler are called as its controller calls them, less the controller."""
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    aim = {"metric": judge, "mode": "max" if JUDGES[judge] else "min"}
    space: dict[str, Any] = {name: tune.choice(list(values)) for name, values in table.choices.items()}
    for name, values in (("rho", table.radii), ("learning_rate", table.rates)):
        space[name] = tune.loguniform(float(values[0]), float(values[-1]))
    searcher = OptunaSearch(seed=seed, points_to_evaluate=[POINT] if way.endswith("file") else None)
    searcher.set_search_properties(aim["metric"], aim["mode"], space)
    last = table.steps[-1]
    factor, first = RIVALS[way]
    scheduler = ASHAScheduler(
        time_attr="step", max_t=last, grace_period=max(1, round(last * first)), reduction_factor=factor, **aim
    )
    known: dict[int, list[dict[str, float]]] = {}
    due: list[tuple[float, int, int]] = []
    numbers = iter(range(num_trials))

    def begin(clock: float) -> None:
        for number in itertools.islice(numbers, 1):
            known[number] = table.curve(searcher.suggest(str(number)))
            scheduler.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
            heapq.heappush(due, (clock + known[number][0]["train_runtime"], number, 0))

    for _ in range(WORKERS):
        begin(0.0)
    while due:
        clock, number, index = heapq.heappop(due)
        evaluation, trial = known[number][index], SimpleNamespace(trial_id=str(number))
        result = {**evaluation, "training_iteration": index + 1}
        stopped = scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if stopped:
            scheduler.on_trial_complete(None, trial, result)
            searcher.on_trial_complete(trial.trial_id, result)
        else:
            searcher.on_trial_result(trial.trial_id, result)
        before = known[number][index - 1]["train_runtime"] if index else 0.0
        yield Told(number, evaluation["train_runtime"] - before, evaluation, evaluation["step"] >= last)
        if stopped:
            begin(clock)
        else:
            following = known[number][index + 1]["train_runtime"] - evaluation["train_runtime"]
            heapq.heappush(due, (clock + following, number, index + 1))


@dataclass(frozen=True)
class Search:
    """What a search found, and when.

    Attributes:
        seconds: of training consumed at each time that it found better, ascending.
        values: of the judge then: the best of all evaluations of the trials that ran to their end.
        trials: how many were begun.
    """

    seconds: list[float]
    values: list[float]
    trials: int

    def value_at(self, seconds: float) -> float:
        """The best value after so much training; NaN before the first trial's end."""
        found = [value for at, value in zip(self.seconds, self.values, strict=True) if at <= seconds]
        return found[-1] if found else math.nan

    def reaches(self, value: float, greater: bool) -> float:
        """Seconds of training until a value as good; infinite if it never came."""
        pairs = zip(self.seconds, self.values, strict=True)
        return next((at for at, now in pairs if (now >= value if greater else now <= value)), math.inf)


def followed(told: Iterator[Told], judge: str, budget: float) -> Search:
    """What is left of a search of which `budget` seconds are paid: a trial's seconds count as they pass."""
    better = max if JUDGES[judge] else min
    best: dict[int, float] = {}
    seconds: list[float] = []
    values: list[float] = []
    consumed = 0.0
    for one in told:
        consumed += one.seconds
        if consumed > budget:
            break
        best[one.trial] = better(best.get(one.trial, one.metrics[judge]), one.metrics[judge])
        if one.complete and (not values or better(best[one.trial], values[-1]) != values[-1]):
            seconds.append(consumed)
            values.append(best[one.trial])
    return Search(seconds, values, len(best))


def search(file: Path, judge: str, way: str, seed: int, trials: int) -> Search:
    """One search of `way`, on a disk that is memory where there is one."""
    table = read_table(file)
    budget, most = trials * table.seconds(), len(table.steps) * trials
    if way in RIVALS:
        return followed(rivals(table, judge, way, seed, most), judge, budget)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="search-efficiency-", dir=memory if memory.is_dir() else None))
    fixed = (f"{name}={table.choices[name][-1]}" for name in NOT_SEARCHED.get(way.partition(" ")[0], ()))
    overrides = (*WAYS[way], *fixed)
    told = ours(table, judge, overrides, seed, most, folder)
    try:
        return followed(told, judge, budget)
    finally:
        told.close()
        shutil.rmtree(folder)


Found = dict[tuple[str, str], list[Search]]


def run_all(arguments: argparse.Namespace, ways: Sequence[str]) -> Found:
    """Every search that the file of searches does not hold yet, and those that it holds."""
    file, found = arguments.output / "searches.jsonl", {}
    keys = {"table": arguments.table.name, "whole_trials": arguments.trials}
    if file.exists():
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if {key: line.pop(key) for key in keys} == keys:
                key = line.pop("judge"), line.pop("way"), line.pop("seed")
                found[key] = Search(**line)
    wanted = [(judge, way, seed) for seed in range(arguments.searches) for judge in arguments.judges for way in ways]
    with ProcessPoolExecutor(arguments.jobs) as processes, file.open("a", encoding="utf-8") as opened:
        running = {
            processes.submit(search, arguments.table, *key, arguments.trials): key for key in wanted if key not in found
        }
        for done in as_completed(running):
            judge, way, seed = key = running[done]
            found[key] = done.result()
            opened.write(json.dumps({**keys, "judge": judge, "way": way, "seed": seed, **vars(found[key])}) + "\n")
            opened.flush()
    return {(judge, way): [found[judge, way, seed] for seed in range(arguments.searches)]
            for judge in arguments.judges for way in ways}  # fmt: skip


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], Any] = np.median) -> str:
    """A statistic with what holds it in 95 of 100 resamples."""
    random = np.random.default_rng(0)
    resampled = [statistic(random.choice(values, len(values))) for _ in range(2000)]
    low, high = np.quantile(resampled, [0.025, 0.975], method="nearest")
    return f"{_short(float(statistic(values)))} ({_short(float(low))} to {_short(float(high))})"


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not reached"


def told(table: Table, judge: str, ways: Sequence[str], found: Found, trials: int) -> str:
    """The tables of one judge, in Markdown."""
    greater, best, budget = JUDGES[judge], table.best(judge), trials * table.seconds()
    finals = np.array([one.value_at(budget) for one in found[judge, RANDOM]])
    target = float(np.median(finals))
    lines = [
        f"## Judged by {judge}",
        "",
        f"Regret after so many seconds of training, of {budget:.0f}: the median of {len(finals)} searches, and its "
        f"95 % interval. The best of the table is {best:.4g}.",
        "",
        "| way to search | " + " | ".join(f"{share * budget:.0f} s" for share in BUDGETS) + " | trials |",
        "| --- |" + " ---: |" * (len(BUDGETS) + 1),
    ]
    for way in ways:
        searches = found[judge, way]
        regrets = [[abs(best - one.value_at(share * budget)) for one in searches] for share in BUDGETS]
        cells = [interval(np.nan_to_num(np.array(row), nan=math.inf)) for row in regrets]
        lines.append(f"| {way} | {' | '.join(cells)} | {np.median([one.trials for one in searches]):.0f} |")
    lines += [
        "",
        f"Seconds of training until {judge} is {target:.4g}, which random search has at its end in the median:",
        "",
        "| way to search | seconds | of random's | searches that got there |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way in ways:
        reached = np.array([one.reaches(target, greater) for one in found[judge, way]])
        cells = [interval(reached), interval(reached / budget), f"{np.isfinite(reached).mean():.0%}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(table: Table, judges: Sequence[str], ways: Sequence[str], found: Found, trials: int, file: Path) -> None:
    """Median regret against seconds of training, a panel a judge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budget = trials * table.seconds()
    seconds = np.geomspace(table.seconds(), budget, 100)
    figure, panels = pyplot.subplots(1, len(judges), figsize=(6.5 * len(judges), 5), squeeze=False)
    for panel, judge in zip(panels[0], judges, strict=True):
        best = table.best(judge)
        for way in ways:
            regret = np.array([[abs(best - one.value_at(at)) for at in seconds] for one in found[judge, way]])
            quartiles = np.quantile(np.nan_to_num(regret, nan=np.inf), [0.25, 0.5, 0.75], axis=0, method="nearest")
            bold = way in (DEFAULT, RANDOM, RIVAL)
            (line,) = panel.plot(seconds, quartiles[1], label=way, lw=2.2 if bold else 1, ls="-" if bold else "--")
            if bold:
                panel.fill_between(seconds, quartiles[0], quartiles[2], color=line.get_color(), alpha=0.12)
        panel.set(title=f"judged by {judge}", xlabel="seconds of training", ylabel="regret", xscale="log", yscale="log")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Search, then tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=50, help="of each way")
    parser.add_argument("--trials", type=int, default=64, help="whole trials that a search may cost")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--output", type=Path, default=Path("search_efficiency"), help="folder")
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *RIVALS], help="all if absent")
    arguments = parser.parse_args()
    table = read_table(arguments.table)
    ways = list(dict.fromkeys([RANDOM, *(arguments.ways or [*WAYS, *RIVALS])]))
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = run_all(arguments, ways)
    text = "\n".join(told(table, judge, ways, found, arguments.trials) for judge in arguments.judges)
    (arguments.output / "search_efficiency.md").write_text(text, encoding="utf-8")
    draw(table, arguments.judges, ways, found, arguments.trials, arguments.output / "search_efficiency.png")
    print(text)


if __name__ == "__main__":
    main()
