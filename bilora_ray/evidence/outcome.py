"""The outcome of a comparison: what was tuned and run, what that says, in words, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from bilora_ray.evidence.statistics import LEAST_PAIRS, METHOD, MOST_SEEDS, Difference, differences
from bilora_ray.words import in_short, setting_in_short

HOUR_S = 3600.0
BASELINE, BETTER, WORSE = "baseline", "better", "worse"
SAME, FEW, NONE = "not distinguishable", "too few pairs", "no runs"
# Of a table: cells, and the settings of an entry.
Row = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run of an entry, with its best settings and one of the seeds.

    Attributes:
        entry: of the comparison.
        seed: which all entries have a run of.
        quality: the metric on the test rows; None: the run has failed.
        sharpness: of its adapter; None: not measured.
        step_seconds: of an optimizer step.
        memory_gib: the most GPU memory it took; None: not known.
        train_seconds: of its training.
        forgetting: the rise of the loss on `retention_data`; None: not measured.
        adapter_mb: of its adapter's weights.
    """

    entry: str
    seed: int
    quality: float | None
    sharpness: float | None
    step_seconds: float | None
    memory_gib: float | None
    train_seconds: float | None
    forgetting: float | None = None
    adapter_mb: float | None = None

    @property
    def has_score(self) -> bool:
        """Whether it can be compared: it has not failed, and its metric is a number."""
        return self.quality is not None and math.isfinite(self.quality)


@dataclass(frozen=True)
class Tuned:
    """What the tuning of an entry found.

    Attributes:
        entry: of the comparison.
        settings: the best ones that were searched.
        value: of the metric on the validation rows, with these; the best of many, so better than a fresh run's.
        trials: that were complete.
        device_hours: of all of them.
        edges: searched numbers whose best value lies at the edge of its range.
    """

    entry: str
    settings: dict[str, Any]
    value: float | None
    trials: int
    device_hours: float
    edges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """All that a comparison found.

    Attributes:
        name: of the comparison.
        metric: on the test rows, such as `test_accuracy`.
        greater_is_better: which of two values is the better one.
        baseline: the entry that the others are compared with.
        budget: what was equal: `steps` or `seconds`.
        runs: all that have ended.
        tuned: an entry each, in the order of the file.
        extended: whether seeds were added after the outcome of fewer was looked at.
        price_per_hour: of a device; None: not known.
        devices: of one run.
        seed: of the bootstrap.
    """

    name: str
    metric: str
    greater_is_better: bool
    baseline: str
    budget: str
    runs: tuple[Run, ...]
    tuned: tuple[Tuned, ...]
    extended: bool = False
    price_per_hour: float | None = None
    devices: float = 1.0
    seed: int = 0

    @property
    def entries(self) -> tuple[str, ...]:
        """The baseline, then the others in the order of the file."""
        named = [one.entry for one in self.tuned] + [run.entry for run in self.runs]
        return tuple(dict.fromkeys([self.baseline, *named]))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the runs."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @cached_property
    def differences(self) -> dict[str, Difference | None]:
        """Entry -> its paired difference to the baseline; None with fewer than two pairs."""
        return differences(
            {entry: self._by_seed(entry, lambda run: run.quality) for entry in self.entries},
            self.baseline,
            seed=self.seed,
        )

    def of(self, entry: str) -> tuple[Run, ...]:
        """The runs of an entry."""
        return tuple(run for run in self.runs if run.entry == entry)

    def mean(self, entry: str) -> float | None:
        """The mean of the metric over the runs that have one; None without any."""
        known = self._scores(entry)
        return fmean(known) if known else None

    def deviation(self, entry: str) -> float | None:
        """The standard deviation of the same, from seed to seed; None with fewer than two."""
        known = self._scores(entry)
        return stdev(known) if len(known) > 1 else None

    def step_time_ratio(self, entry: str) -> float | None:
        """How many times as long as the baseline's a step takes: the median of the seeds' ratios."""
        steps = [self._by_seed(name, lambda run: run.step_seconds) for name in (entry, self.baseline)]
        ratios = [own / other for own, other in zip(*steps, strict=True) if own is not None and other]
        return median(ratios) if ratios else None

    def device_hours(self, entry: str) -> float:
        """What its tuning and its runs have trained for, times their devices."""
        tuning = sum(one.device_hours for one in self.tuned if one.entry == entry)
        return tuning + self.devices * sum(run.train_seconds or 0.0 for run in self.of(entry)) / HOUR_S

    def cost(self, entry: str) -> float | None:
        """The same at the price of a device; None without one."""
        return None if self.price_per_hour is None else self.price_per_hour * self.device_hours(entry)

    def over_runs(self, entry: str, what: Callable[[Run], float | None], of: Callable[[list[float]], float]) -> Any:
        """What the runs of an entry come to, such as the mean of their sharpness; None where none knows it."""
        known = [value for value in map(what, self.of(entry)) if value is not None]
        return of(known) if known else None

    def verdict(self, entry: str) -> str:
        """What is to be said of an entry, in one of six words: see the constants of this module."""
        if entry == self.baseline:
            return BASELINE
        if not self.of(entry):
            return NONE
        found = self.differences[entry]
        if found is None or found.pairs < LEAST_PAIRS:
            return FEW
        if not found.distinguishable:
            return SAME
        return BETTER if (found.mean > 0) is self.greater_is_better else WORSE

    def _scores(self, entry: str) -> list[float]:
        return [run.quality for run in self.of(entry) if run.quality is not None and run.has_score]

    def _by_seed(self, entry: str, what: Callable[[Run], float | None]) -> list[float | None]:
        known = {run.seed: what(run) for run in self.of(entry)}
        return [known.get(seed) for seed in self.seeds]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON; what is not known is null, a metric that is no number among it."""
    plain = ("name", "metric", "greater_is_better", "baseline", "budget", "extended", "price_per_hour", "devices")
    return {
        **{key: getattr(outcome, key) for key in plain},
        "seeds": list(outcome.seeds),
        "statistics": METHOD,
        "entries": [_entry_as_json(outcome, entry) for entry in outcome.entries],
        "runs": [{**asdict(run), "quality": run.quality if run.has_score else None} for run in outcome.runs],
        "sentences": sentences(outcome),
        "notes": notes(outcome),
    }


def as_table(outcome: Outcome) -> tuple[tuple[str, ...], list[Row]]:
    """The outcome as a table: its columns; and of each entry the cells and the settings that tuning chose.

    A column that would be empty is left out.
    """
    columns = {
        "method": list(outcome.entries),
        outcome.metric.removeprefix("test_"): [in_short(outcome.mean(entry)) for entry in outcome.entries],
        **_compared(outcome),
        **{
            SHORT.get(key, key): [_brief(of(outcome, entry)) for entry in outcome.entries]
            for key, of in MEASURED.items()
        },
    }
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    settings = {one.entry: one.settings for one in outcome.tuned}
    rows = zip(*shown.values(), strict=True)
    return tuple(shown), [(cells, settings.get(entry, {})) for entry, cells in zip(outcome.entries, rows, strict=True)]


def sentences(outcome: Outcome) -> list[str]:
    """What the outcome says, a line an entry."""
    mean, deviation = outcome.mean(outcome.baseline), outcome.deviation(outcome.baseline)
    runs = sum(run.has_score for run in outcome.of(outcome.baseline))
    spread = "" if deviation is None else f", standard deviation {in_short(deviation)}"
    scored = "no run has a score" if mean is None else f"{outcome.metric} {in_short(mean)}, mean of {runs} runs{spread}"
    others = (entry for entry in outcome.entries if entry != outcome.baseline)
    return [f"{outcome.baseline}: {scored}", *(_sentence(outcome, entry) for entry in others)]


def notes(outcome: Outcome) -> list[str]:
    """What there is to know before the outcome is believed: lines without an end."""
    return [*_of_tuning(outcome), *_of_choices(outcome), *_of_failures(outcome), *_of_pairs(outcome)]


def _sentence(outcome: Outcome, entry: str) -> str:
    found, verdict = outcome.differences[entry], outcome.verdict(entry)
    if verdict == NONE:
        return f"{entry}: has no runs: no trial of its tuning is complete"
    if found is None:
        return f"{entry}: not compared with {outcome.baseline}: fewer than two pairs of runs have scores"
    sure = f"Holm p {_probability(found.p_holm)}"
    if verdict in (BETTER, WORSE):
        low, high = sorted((abs(found.low), abs(found.high)))
        amount = f"{entry}: {_amount(found, abs(found.mean))} {verdict} than {outcome.baseline}"
        return f"{amount} (95 %: {_amount(found, low)} to {_amount(found, high)}; {sure})"
    told = f"{_signed(found)}; 95 %: {_interval(found)}; {sure}"
    if verdict == FEW:
        return f"{entry}: {told}, {found.pairs} pairs: too few to tell it from {outcome.baseline}"
    return f"{entry}: {SAME} from {outcome.baseline} ({told}){_seeds(found)}"


def _seeds(found: Difference) -> str:
    """How many seeds would tell: the end of a sentence. Nothing where these should have told as well."""
    if found.mean == 0:
        return ""
    if found.seeds_needed is None:
        return f"; a difference of this size would take more than {MOST_SEEDS:,} seeds to tell"
    told = f"; {found.seeds_needed:,} seeds would tell a difference of this size"
    return told if found.seeds_needed > found.pairs else ""


def _of_tuning(outcome: Outcome) -> Iterator[str]:
    for one in outcome.tuned:
        for edge in one.edges:
            best = f"its best {edge} ({setting_in_short(one.settings.get(edge))})"
            yield f"{one.entry}: {best} is at the edge of its range; a wider one may have better ones"
    if len({one.trials for one in outcome.tuned}) > 1:
        counts = ", ".join(f"{one.entry} {one.trials}" for one in outcome.tuned)
        yield f"not all were tuned with as many complete trials: {counts}"


def _of_choices(outcome: Outcome) -> Iterator[str]:
    """A line where a difference may be one of what both have searched, and not of the methods."""
    chosen = {one.entry: one.settings for one in outcome.tuned}
    base = chosen.get(outcome.baseline, {})
    for entry, own in chosen.items():
        others = [key for key in base if own.get(key, base[key]) != base[key]]
        if others and outcome.verdict(entry) in (BETTER, WORSE):
            told = [", ".join(f"{key} {setting_in_short(kept[key])}" for key in others) for kept in (own, base)]
            draw = "what tuning chose is one draw, which no interval knows; a range of that value alone tells more"
            yield f"{entry}: has {told[0]}, {outcome.baseline} {told[1]}: {draw}"


def _of_failures(outcome: Outcome) -> Iterator[str]:
    for entry in outcome.entries:
        runs = outcome.of(entry)
        without = sum(not run.has_score for run in runs)
        if without:
            left = "all pairs with them are" if entry == outcome.baseline else "their pairs are"
            flatters = f"; if it fails by its settings, what is said of {entry} flatters it"
            yield f"{entry}: {without} of {len(runs)} runs have no score, and {left} left out{flatters}"


def _of_pairs(outcome: Outcome) -> Iterator[str]:
    found = {entry: one for entry, one in outcome.differences.items() if one is not None}
    if any(one.pairs < LEAST_PAIRS for one in found.values()):
        yield (
            f"fewer than {LEAST_PAIRS} pairs tell little: nothing is called better or worse of them, and the intervals "
            "hold only if noise is near to normal"
        )
    for entry, one in found.items():
        if one.mean == 0 and _alike(outcome, entry):
            scores = f"{entry}: scores on each seed what {outcome.baseline} scores"
            yield f"{scores}; if it is not the same under another name, {outcome.metric} is too coarse"
    if outcome.extended:
        yield "seeds were added after a look at the outcome of fewer, of which the intervals and p-values do not know"


def _alike(outcome: Outcome, entry: str) -> bool:
    """Whether an entry scores what the baseline does, on each seed that both have a score of."""
    scores = [
        {run.seed: run.quality for run in outcome.of(name) if run.has_score} for name in (entry, outcome.baseline)
    ]
    own, other = scores
    return all(own[seed] == other[seed] for seed in own.keys() & other.keys())


def _compared(outcome: Outcome) -> dict[str, list[str]]:
    """The columns of the differences, empty for the baseline."""
    found = [outcome.differences.get(entry) for entry in outcome.entries]
    lost = any(one is not None and one.pairs < len(outcome.seeds) for one in found)
    return {
        "difference": ["" if one is None else _signed(one) for one in found],
        "interval": ["" if one is None else _interval(one) for one in found],
        "Holm_p": ["" if one is None else _probability(one.p_holm) for one in found],
        # As many as there are seeds, unless runs have failed.
        "pairs": ["" if one is None or not lost else str(one.pairs) for one in found],
    }


def _entry_as_json(outcome: Outcome, entry: str) -> dict[str, Any]:
    found, tuned = outcome.differences.get(entry), [one for one in outcome.tuned if one.entry == entry]
    return {
        "entry": entry,
        "verdict": outcome.verdict(entry),
        "mean": outcome.mean(entry),
        "standard_deviation": outcome.deviation(entry),
        "runs": len(outcome.of(entry)),
        "failed": sum(not run.has_score for run in outcome.of(entry)),
        "difference": None if found is None else asdict(found),
        **{key: of(outcome, entry) for key, of in MEASURED.items()},
        "tuned": {key: value for key, value in asdict(tuned[0]).items() if key != "entry"} if tuned else None,
    }


def _signed(found: Difference) -> str:
    value = _amount(found, found.mean)
    return value if value.startswith("-") else f"+{value}"


def _interval(found: Difference) -> str:
    return f"{_amount(found, found.low)} to {_amount(found, found.high)}"


def _amount(found: Difference, value: float) -> str:
    """A value to as many places as the width of the interval carries: two digits of that."""
    width = found.high - found.low
    if width <= 0:
        return f"{value:.3g}"
    places = max(0, 1 - math.floor(math.log10(width)))
    return f"{round(value, places) + 0.0:.{places}f}"


def _brief(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _mean_of(key: str) -> Callable[[Outcome, str], float | None]:
    return lambda outcome, entry: outcome.over_runs(entry, lambda run: getattr(run, key), fmean)


def _most_of(key: str) -> Callable[[Outcome, str], float | None]:
    return lambda outcome, entry: outcome.over_runs(entry, lambda run: getattr(run, key), max)


# What else there is to say of an entry: a column of the table, a key of JSON -> how it is got.
MEASURED: dict[str, Callable[[Outcome, str], float | None]] = {
    "sharpness": _mean_of("sharpness"),
    "forgetting": _mean_of("forgetting"),
    "step_time_ratio": Outcome.step_time_ratio,
    "memory_gib": _most_of("memory_gib"),
    "adapter_mb": _mean_of("adapter_mb"),
    "device_hours": Outcome.device_hours,
    "cost": Outcome.cost,
}
# The same -> what a column is called, where that is too long.
SHORT = {"step_time_ratio": "step_time", "memory_gib": "GiB", "adapter_mb": "MB", "device_hours": "hours"}
# The columns of what is measured beside the metric.
COLUMNS = frozenset(SHORT.get(key, key) for key in MEASURED)
