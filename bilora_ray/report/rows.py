"""The rows that charts are drawn of: trials, and their evaluations, as plain values that JSON holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.report.found import Found
from bilora_ray.search.space import Choice, Range
from bilora_ray.words import setting_in_short, status_of

Row = dict[str, Any]
BEST = "the best"
# What an evaluation tells of how a method sees the loss around it -> what a chart of it is called.
WATCHED = {"auxiliary_norm": "Norm of the auxiliary's perturbation", "sharpness": "Sharpness"}
# The same of the best trial alone, as shares: 1 is all there is -> what a legend calls it.
SHARES = {
    "captured_sharpness": "captured",
    "stale_captured_sharpness": "by a batch-old one",
    "auxiliary_cosine": "cosine",
}
# So many evaluations are drawn at the most, or the page would be slow and large.
MOST_EVALUATIONS = 12_000
# Beyond so many interquartile ranges from the quartiles, which is Tukey's outer fence, values lie at the edge.
FENCE = 3.0
# Beside a setting's name: where its value lies on an axis from 0 to 1.
SCALED = "scaled "


def trial_rows(found: Found) -> list[Row]:
    """A row for each trial that has a value; the best come last, and so are drawn on top."""
    laid_out, known = axes(found), [record for record in _drawn(found) if _plain(record.value) is not None]
    rows = [_trial_row(record, found, laid_out) for record in known]
    if (ends := window([row["value"] for row in rows], found.objective)) is not None:
        for row in rows:
            inside = min(max(row["value"], ends[0]), ends[1])
            row[f"{SCALED}{found.metric}"] = _plain((inside - ends[0]) / (ends[1] - ends[0]))
    return rows


def _trial_row(record: TrialRecord, found: Found, laid_out: Mapping[str, Axis]) -> Row:
    last = record.history[-1] if record.history else {}
    costs = {key: _plain(last.get(key)) for key in ("train_runtime", "gpu_memory_gib")}
    values = {one.metric: _plain(record.values.get(one.metric)) for one in found.objectives}
    settings = {key: axis.of(record.sampled[key]) for key, axis in laid_out.items() if key in record.sampled}
    scaled = {f"{SCALED}{key}": _plain(laid_out[key].scaled(value)) for key, value in settings.items()}
    return {
        "trial": record.number,
        "status": _group(record, found),
        **{key: value for key, value in costs.items() if value is not None},
        **values,
        "value": _plain(record.value),
        "front": record.number in found.front,
        # Trials with one value of a choice lie apart, always in the same way.
        **dict(zip(("apart", "also_apart"), _apart(record.number), strict=True)),
        **settings,
        **scaled,
    }


def evaluation_rows(found: Found) -> list[Row]:
    """A row for each evaluation, or for as many of each trial as there is room for; the best trial comes last."""
    records = [record for record in _drawn(found) if record.history]
    most = max(2, MOST_EVALUATIONS // max(1, len(records)))
    rows = []
    for record in records:
        group, unit = _group(record, found), x_of(found)
        thinned = _thinned(record.history, most)
        for told in thinned:
            watched = {key: _plain(told.get(key)) for key in WATCHED if key in told}
            value = _plain(told.get(found.metric))
            at = {"trial": record.number, "status": group, unit: _plain(told[unit]), "last": told is thinned[-1]}
            rows.append({**at, "value": value, **watched})
    return rows


def share_rows(found: Found) -> list[Row]:
    """A row for each of the `SHARES` that evaluations of the best trial tell; none where only one does."""
    unit, history = x_of(found), [] if found.chosen is None else found.chosen.history
    told = [metrics for metrics in history if SHARES.keys() & metrics.keys()]
    return [
        {unit: _plain(metrics[unit]), "what": title, "share": _plain(metrics[key])}
        for metrics in (told if len(told) > 1 else [])
        for key, title in SHARES.items()
        if key in metrics
    ]


def x_of(found: Found) -> str:
    """How far a training has come, in what all trials share: epochs, or steps where the study tells of no epochs."""
    told = [metrics for record in found.records for metrics in record.history]
    return "epoch" if told and all("epoch" in metrics for metrics in told) else "step"


def statuses(rows: Sequence[Row]) -> list[str]:
    """The words for how the trials of `rows` stand, in the order in which a legend has them."""
    present = {row["status"] for row in rows}
    first = [BEST, "complete", "stopped early"]
    return [word for word in first if word in present] + sorted(present - set(first))


def best_so_far(found: Found) -> list[Row]:
    """After each trial that is complete and better than all before it, its value; and that of the best at the end."""
    rows: list[Row] = []
    best: float | None = None
    for record in found.records:
        value = _plain(record.value)
        if record.status is Status.COMPLETE and value is not None and found.objective.is_better(value, best):
            best = value
            rows.append({"trial": record.number, "value": value})
    if rows:
        rows.append({"trial": found.records[-1].number, "value": best})
    return rows


def window(values: Sequence[float], objective: Objective) -> tuple[float, float] | None:
    """From where to where values are worth drawing: what is far worse than most lies at the edge. None: all alike."""
    if not values or min(values) == max(values):
        return None
    losses = np.array([objective.as_loss(value) for value in values])
    first, third = np.quantile(losses, [0.25, 0.75])
    fence = third + FENCE * (third - first) if third > first else math.inf
    ends = sorted(objective.as_loss(float(end)) for end in (losses.min(), losses[losses <= fence].max()))
    return ends[0] + 0.0, ends[1] + 0.0


class Axis:
    """How a searched setting is laid out.

    Args:
        key: the setting.
        found: the study.

    Attributes:
        levels: its values in words, of a choice, in the space's order; None: it is a number of a range.
        log: whether that is on a log scale.
        ends: of the range.
    """

    def __init__(self, key: str, found: Found) -> None:
        self.key = key
        parts = [found.space.distributions[name] for name in found.space.names_of(key)]
        ranges = [part for part in parts if isinstance(part, Range)]
        choices = [value for part in parts if isinstance(part, Choice) for value in part.choice]
        self.levels: list[str] | None = None
        self.log, self.ends = False, (0.0, 1.0)
        if choices:
            drawn = [record.sampled[key] for record in found.records if key in record.sampled]
            self.levels = list(dict.fromkeys(map(setting_in_short, [*choices, *drawn])))
        else:
            self.log = all(part.log for part in ranges)
            self.ends = (min(float(part.low) for part in ranges), max(float(part.high) for part in ranges))

    def of(self, value: Any) -> Any:
        """`value` as the axis has it."""
        return setting_in_short(value) if self.levels is not None else _plain(float(value))

    def scaled(self, value: Any) -> float:
        """Where what `of` gave lies between the ends, 0 to 1."""
        if self.levels is not None:
            return self.levels.index(value) / (len(self.levels) - 1) if len(self.levels) > 1 else 0.5
        low, high = self.ends
        if self.log:
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Where which words stand beside the axis."""
        if self.levels is not None:
            return [(self.scaled(level), level) for level in self.levels]
        low, high = self.ends
        return [(0.0, setting_in_short(low)), (1.0, setting_in_short(high))]


def axes(found: Found) -> Mapping[str, Axis]:
    """Setting -> its axis, those that mattered first."""
    return {key: Axis(key, found) for key in found.settings}


def _group(record: TrialRecord, found: Found) -> str:
    return BEST if found.chosen is not None and record.number == found.chosen.number else status_of(record)


def _drawn(found: Found) -> list[TrialRecord]:
    """All trials in the order in which they are drawn: the best on top, that which the search comes to above all."""
    rest = [record for record in reversed(found.ranked) if record is not found.chosen]
    return rest if found.chosen is None else [*rest, found.chosen]


def _thinned(history: Sequence[Mapping[str, float]], most: int) -> list[Mapping[str, float]]:
    """At most so many of the evaluations, the first and the last among them."""
    if len(history) <= most:
        return list(history)
    return [history[round(index * (len(history) - 1) / (most - 1))] for index in range(most)]


def _apart(number: int) -> tuple[float, float]:
    """A place from 0 to 1 each way, even for any run of numbers.

    Roberts' sequence (https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences/).
    """
    return round(number * 0.7548776662 % 1, 3), round(number * 0.5698402910 % 1, 3)


def _plain(value: float | None) -> float | None:
    """A number as JSON holds it, in digits that a picture shows; None of what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
