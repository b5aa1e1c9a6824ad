"""What charts are made of: their look, and the scales, axes, colours and points that several of them share.

Colours are names of the page's style sheet, so that one picture is drawn for light, for dark and for paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from bilora_ray.report.found import Found
from bilora_ray.report.rows import BEST, Axis, Row, axes, statuses, window

Chart = alt.Chart | alt.LayerChart | alt.FacetChart
# The page gives the rows of these names, so that the charts of a study share them.
TRIALS, EVALUATIONS = "trials", "evaluations"
COLOURS = {BEST: "var(--best)", "complete": "var(--accent)", "stopped early": "var(--faint)", "failed": "var(--bad)"}
OTHERS = "var(--other)"
IS_BEST = f"datum.status === '{BEST}'"
# From the worst to the best.
STEPS = [f"var(--step-{step})" for step in range(6)]
# From so many trials on marks are lighter and smaller.
MANY = 200
HEIGHT = 300
# From such a ratio on, of the largest to the smallest.
SEVERAL_ORDERS = 30
# The look that all charts share; `null` leaves something out.
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "padding": {"left": 4, "right": 12, "top": 6, "bottom": 4},
    "view": {"stroke": None, "continuousHeight": HEIGHT},
    "axis": {
        "domainColor": "var(--line)",
        "gridColor": "var(--line)",
        "gridOpacity": 0.6,
        "tickColor": "var(--line)",
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "titlePadding": 8,
        "labelLimit": 130,
        "labelOverlap": "greedy",
    },
    "axisX": {"grid": False, "tickCount": 6},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6, "tickCount": 5},
    "legend": {
        "orient": "top",
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": 500,
        "symbolStrokeWidth": 2,
        "columns": 4,
        "gradientLength": 250,
        "gradientThickness": 10,
        "labelOverlap": "greedy",
    },
    "point": {"filled": True, "size": 55},
    "text": {"color": "var(--soft)", "fontSize": 11},
}


def points(rows: Sequence[Row]) -> alt.Chart:
    """A point a trial."""
    return alt.Chart(alt.NamedData(name=TRIALS)).mark_circle(opacity=0.9, size=60 if are_few(rows) else 28)


def by_status(chart: alt.Chart, rows: Sequence[Row]) -> alt.Chart:
    """Points of trials of which the best stands out, however many they are."""
    few = are_few(rows)
    plain = 60 if few else 28
    size = alt.when(IS_BEST).then(alt.value(2.2 * plain)).otherwise(alt.value(plain))
    solid = alt.when(IS_BEST).then(alt.value(1)).otherwise(alt.value(0.9 if few else 0.55))
    return chart.mark_circle().encode(size=size, opacity=solid)


def are_few(rows: Sequence[Row]) -> bool:
    """Whether the trials of `rows` can be told apart without lighter marks."""
    return len(rows) < MANY


def wide(chart: Chart, height: int = HEIGHT) -> Chart:
    """As wide as its place on the page."""
    return chart.properties(width="container", height=height)


def snug() -> alt.Scale:
    """A scale that ends little beyond its numbers."""
    return alt.Scale(nice=False, zero=False, padding=6)


def between(ends: tuple[float, float] | None) -> alt.Scale:
    """A scale for numbers between `ends`; what is beyond them lies at the edge."""
    if ends is None:
        return alt.Scale(zero=False)
    return alt.Scale(domain=list(ends), zero=False, clamp=True, nice=True)


def positive(key: str, title: str, values: Sequence[float]) -> alt.Y:
    """Sizes, by their logarithms where they are of several orders."""
    low, high = min(values), max(values)
    if low <= 0 or high < SEVERAL_ORDERS * low:
        return alt.Y(f"{key}:Q", title=title, scale=alt.Scale(zero=True))
    ticks = alt.Axis(values=_decades(low, high), format="~g")
    return alt.Y(f"{key}:Q", title=title, scale=alt.Scale(type="log", nice=False, padding=6), axis=ticks)


def value(found: Found, rows: Sequence[Row]) -> alt.Y:
    """The trials' values, upwards."""
    return alt.Y("value:Q", title=found.metric, scale=between(window([row["value"] for row in rows], found.objective)))


def status(
    rows: Sequence[Row], legend: alt.Legend | alt.utils.schemapi.UndefinedType | None = alt.Undefined
) -> alt.Color:
    """Colours by how the trials ended."""
    domain = statuses(rows)
    scale = alt.Scale(domain=domain, range=[COLOURS.get(word, OTHERS) for word in domain])
    return alt.Color("status:N", title=None, scale=scale, legend=legend)


def strength(found: Found, rows: Sequence[Row]) -> alt.Color:
    """Colours by the value: the better, the stronger."""
    ends = window([row["value"] for row in rows], found.objective) or (0.0, 1.0)
    steps = STEPS if found.objective.greater_is_better else STEPS[::-1]
    scale = alt.Scale(type="quantize", domain=list(ends), range=steps)
    return alt.Color("value:Q", title=found.metric, scale=scale, legend=alt.Legend(format=".3g", columns=6))


def x(axis: Axis) -> alt.X:
    """A setting, from left to right."""
    return alt.X(_field(axis), title=axis.key, scale=_scale(axis), sort=axis.levels or alt.Undefined, axis=_ticks(axis))


def y(axis: Axis) -> alt.Y:
    """A setting, upwards."""
    if axis.levels is None:
        return alt.Y(_field(axis), title=axis.key, scale=_scale(axis), axis=_ticks(axis))
    upwards = axis.levels[::-1]
    return alt.Y(_field(axis), title=axis.key, scale=alt.Scale(domain=upwards), sort=upwards, axis=alt.Axis(grid=True))


def _ticks(axis: Axis) -> alt.Axis:
    if axis.levels is not None:
        return alt.Axis(labelAngle=0)
    values = _decades(*axis.ends) if axis.log else alt.Undefined
    return alt.Axis(labelAngle=0, format="~g", tickCount=5, values=values)


def _decades(low: float, high: float) -> list[float]:
    """Round numbers of a log scale that are far enough apart to be read."""
    span = math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if span < 1.5 else (1.0, 3.0) if span < 3.5 else (1.0,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for step in steps if low <= (value := step * 10.0**power) <= high]


def _field(axis: Axis) -> str:
    return f"{axis.key}:{'Q' if axis.levels is None else 'O'}"


def _scale(axis: Axis) -> alt.Scale:
    if axis.levels is not None:
        return alt.Scale(domain=axis.levels)
    return alt.Scale(type="log" if axis.log else "linear", domain=list(axis.ends), nice=False, padding=6)


def apart(points: alt.Chart, x: Axis, y: Axis | None = None) -> alt.Chart:
    """Trials of one level beside one another."""
    spread = alt.Scale(domain=[-0.4, 1.4])
    if x.levels is not None:
        points = points.encode(xOffset=alt.XOffset("apart:Q", scale=spread))
    if y is not None and y.levels is not None:
        points = points.encode(yOffset=alt.YOffset("also_apart:Q", scale=spread))
    return points


def tooltip(found: Found) -> list[alt.Tooltip]:
    """What is told of the trial that is pointed at."""
    others = [alt.Tooltip(f"{one.metric}:Q", format=".4g") for one in found.objectives[1:]]
    told = [_told(axis) for axis in axes(found).values()]
    value = alt.Tooltip("value:Q", title=found.metric, format=".4g")
    return [alt.Tooltip("trial:Q"), alt.Tooltip("status:N"), value, *others, *told]


def _told(axis: Axis) -> alt.Tooltip:
    return alt.Tooltip(_field(axis)) if axis.levels is not None else alt.Tooltip(_field(axis), format=".3g")
