"""A picture of a comparison: the paired differences with their intervals, and the runs seed by seed."""

from __future__ import annotations

from typing import Any

import altair as alt

from bilora_ray.evidence.outcome import BETTER, FEW, NONE, SAME, WORSE, Outcome
from bilora_ray.pictures import BLUE, ORANGE, SOFT, png

COLOURS = {BETTER: BLUE, WORSE: ORANGE, SAME: SOFT, FEW: SOFT, NONE: SOFT}
SEEDS = "#b9c0ca"
# Of a panel, of an entry's row in it, and between the two, where the verdicts stand.
WIDTH, ROW, BETWEEN = 285, 34, 135
ENTRIES = {"domain": False, "ticks": False, "grid": True, "labelFontSize": 12, "labelLimit": 130, "labelPadding": 8}


def picture(outcome: Outcome) -> bytes:
    """The outcome as a PNG, 900 pixels wide at half its size: a row an entry, the baseline first.

    On the left the differences to the baseline, on the right the scores, those of a seed joined by a line.
    """
    panels = alt.hconcat(_differences(outcome), _runs(outcome), spacing=BETWEEN, bounds="flush")
    return png(panels.properties(title=_title(outcome)), axisY=ENTRIES)


def _title(outcome: Outcome) -> alt.TitleParams:
    side = "the right" if outcome.greater_is_better else "the left"
    seeds = f"{len(outcome.seeds)} seeds" if len(outcome.seeds) != 1 else "1 seed"
    equal = f"{seeds}, equal {outcome.budget}, tuned alike; {side} is better"
    look: dict[str, Any] = {
        "fontSize": 14,
        "subtitleColor": SOFT,
        "subtitleFontSize": 12,
        "subtitlePadding": 4,
        "offset": 14,
    }
    return alt.TitleParams(f"{outcome.name}: {outcome.metric}", subtitle=equal, **look)


def _differences(outcome: Outcome) -> Any:
    found = {entry: one for entry, one in outcome.differences.items() if one is not None}
    rows = [
        {"entry": entry, "mean": one.mean, "low": one.low, "high": one.high, "verdict": outcome.verdict(entry)}
        for entry, one in found.items()
    ]
    words = [
        {"entry": entry, "verdict": outcome.verdict(entry), "word": outcome.verdict(entry)}
        for entry in outcome.entries
        if entry != outcome.baseline
    ]
    color = alt.Color("verdict:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), legend=None)
    x, base = _x("mean", f"difference to {outcome.baseline}"), alt.Chart(alt.Data(values=rows))
    zero = alt.Chart(alt.Data(values=[{"mean": 0.0}])).mark_rule(color=SOFT, strokeDash=[4, 3]).encode(x)
    lines = base.mark_rule(strokeWidth=3).encode(_x("low", ""), alt.X2("high:Q"), _y(outcome, labels=True), color)
    points = base.mark_circle(size=110, opacity=1).encode(x, _y(outcome, labels=True), color)
    said = alt.Chart(alt.Data(values=words)).mark_text(align="left", fontSize=12)
    verdicts = said.encode(x=alt.XValue(WIDTH + 12), y=_y(outcome, labels=True), text=alt.Text("word:N"), color=color)
    return _panel(alt.layer(zero, lines, points, verdicts), outcome, "Paired differences, mean and 95 % interval")


def _runs(outcome: Outcome) -> Any:
    rows = [
        {"entry": run.entry, "seed": str(run.seed), "score": run.quality, "place": outcome.entries.index(run.entry)}
        for run in outcome.runs
        if run.has_score
    ]
    means = [{"entry": entry, "score": outcome.mean(entry)} for entry in outcome.entries]
    base, y = alt.Chart(alt.Data(values=rows)), _y(outcome, labels=False)
    x = _x("score", outcome.metric)
    lines = base.mark_line(color=SEEDS, strokeWidth=1).encode(x, y, alt.Detail("seed:N"), alt.Order("place:Q"))
    points = base.mark_circle(color=SEEDS, size=30, opacity=1).encode(x, y)
    known = alt.Chart(alt.Data(values=[row for row in means if row["score"] is not None]))
    middles = known.mark_tick(color="#1c2430", thickness=3, size=ROW * 0.55).encode(x, y)
    return _panel(alt.layer(lines, points, middles), outcome, "Runs, those of a seed joined, and their mean")


def _panel(chart: Any, outcome: Outcome, title: str) -> Any:
    return chart.properties(width=WIDTH, height=ROW * len(outcome.entries), title=title)


def _x(field: str, title: str) -> alt.X:
    scale = alt.Scale(zero=False, nice=False, padding=14)
    return alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5, labelOverlap=True))


def _y(outcome: Outcome, labels: bool) -> alt.Y:
    scale, axis = alt.Scale(domain=list(outcome.entries)), alt.Axis(title=None, labels=labels)
    return alt.Y("entry:N", scale=scale, axis=axis)
