"""The charts of a page: pure functions of what was found, which return Vega-Lite; None where nothing is to be shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from bilora_ray.measures import COSTS
from bilora_ray.report import marks
from bilora_ray.report.found import Found
from bilora_ray.report.marks import EVALUATIONS, TRIALS, Chart
from bilora_ray.report.rows import (
    SCALED,
    SHARES,
    WATCHED,
    Axis,
    Row,
    axes,
    best_so_far,
    evaluation_rows,
    share_rows,
    trial_rows,
    window,
    x_of,
)
from bilora_ray.search.space import setting_of
from bilora_ray.words import in_short

# Pairs of settings that are told by name, where both are searched.
PAIRS = (("rho", "auxiliary_rank"), ("rank", "auxiliary_rank"))
# Of fewer trials with a value a picture says less than the table.
FEWEST = 3
MOST_SLICES, MOST_AXES = 12, 8
LOW = 200


def history(found: Found) -> Chart | None:
    """Each trial's value in the order of the search, and the best so far."""
    rows = trial_rows(found)
    if len(rows) < 2:
        return None
    x = alt.X(
        "trial:Q",
        title="trial, in the order of the search",
        axis=alt.Axis(format="d", tickMinStep=1),
        scale=marks.snug(),
    )
    points = marks.by_status(alt.Chart(), rows).encode(
        x, marks.value(found, rows), marks.status(rows), tooltip=marks.tooltip(found)
    )
    layers = [points]
    if line := best_so_far(found):
        best = alt.Chart(alt.Data(values=line)).mark_line(
            interpolate="step-after", color="var(--best)", strokeWidth=1.5, opacity=0.9
        )
        layers.insert(0, best.encode(x, marks.value(found, rows)))
    return marks.wide(alt.layer(*layers, data=alt.NamedData(name=TRIALS)))


def importances(found: Found) -> Chart | None:
    """What share of the values' variance each setting explains, with its interval."""
    shares = found.importances.shares
    rows = [
        {"setting": key, "share": share.share, "low": share.low, "high": share.high} for key, share in shares.items()
    ]
    if not rows:
        return None
    y = alt.Y("setting:N", sort=None, title=None, axis=alt.Axis(labelLimit=180, labelFontSize=12))
    x = alt.X("share:Q", title="share of the variance", axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1]))
    told = [alt.Tooltip("setting:N"), *(alt.Tooltip(f"{key}:Q", format=".0%") for key in ("share", "low", "high"))]
    base = alt.Chart(alt.Data(values=rows))
    bars = base.mark_bar(color="var(--accent)", height=14, cornerRadius=2).encode(y, x, tooltip=told)
    ends = base.mark_rule(color="var(--ink)", strokeWidth=1.5).encode(y, alt.X("low:Q", title=""), x2="high:Q")
    return marks.wide(alt.layer(bars, ends), 34 * len(rows) + 20)


def slices(found: Found) -> Iterator[Chart]:
    """A picture a setting: where along it the good trials lie."""
    rows = trial_rows(found)
    for key, axis in list(axes(found).items())[:MOST_SLICES]:
        if _is_told(key, rows):
            points = marks.by_status(alt.Chart(alt.NamedData(name=TRIALS)), rows).encode(
                marks.x(axis), marks.value(found, rows), marks.status(rows, None), tooltip=marks.tooltip(found)
            )
            yield marks.wide(marks.apart(points, x=axis), LOW)


def maps(found: Found) -> Iterator[Chart]:
    """A picture a pair of settings: the better a trial, the stronger its colour."""
    rows, laid_out = trial_rows(found), axes(found)
    for across, down in _pairs(found, rows):
        points = marks.points(rows).encode(
            marks.x(laid_out[across]),
            marks.y(laid_out[down]),
            marks.strength(found, rows),
            tooltip=marks.tooltip(found),
        )
        yield marks.wide(marks.apart(points, x=laid_out[across], y=laid_out[down]), 260)


def parallel(found: Found) -> Chart | None:
    """A line a trial, through its settings to its value."""
    rows, laid_out = trial_rows(found), axes(found)
    keys = [key for key in laid_out if _is_told(key, rows)][:MOST_AXES]
    if len(keys) < 2 or len(rows) < FEWEST:
        return None
    ticks = [
        {"setting": key, "at": at, "label": label} for key in keys for at, label in _readable(laid_out[key].ticks())
    ]
    if (ends := window([row["value"] for row in rows], found.objective)) is not None:
        keys.append(found.metric)
        ticks += [{"setting": found.metric, "at": at, "label": in_short(ends[at])} for at in (0, 1)]
    x = alt.X(
        "setting:N",
        sort=keys,
        title=None,
        axis=alt.Axis(
            labelExpr="split(datum.label, '_')",
            labelAngle=0,
            labelPadding=12,
            domain=False,
            ticks=False,
            grid=True,
            gridColor="var(--faint)",
        ),
        scale=alt.Scale(padding=0.35),
    )
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[0, 1]))
    lines = (
        alt.Chart(alt.NamedData(name=TRIALS))
        .transform_fold([f"{SCALED}{key}" for key in keys], as_=["scaled", "at"])
        .transform_filter("isValid(datum.at)")
        .transform_calculate(setting=f"slice(datum.scaled, {len(SCALED)})")
        .mark_line(strokeWidth=1.6 if marks.are_few(rows) else 1, opacity=0.75 if marks.are_few(rows) else 0.45)
        .encode(x, y, marks.strength(found, rows), detail="trial:N", tooltip=marks.tooltip(found))
    )
    words = alt.Chart(alt.Data(values=ticks)).encode(x, y, text="label:N")
    text: dict[str, Any] = {"align": "left", "dx": 5, "fontSize": 10}
    halo = words.mark_text(stroke="var(--paper)", strokeWidth=4, strokeJoin="round", **text)
    return marks.wide(alt.layer(lines, halo, words.mark_text(color="var(--ink)", **text)), 320)


def curves(found: Found) -> Chart | None:
    """The metric as each trial trained: those that were stopped in grey."""
    return _curves(found, "value", found.metric)


def watched(found: Found) -> Iterator[Chart]:
    """What each trial's method saw of the loss around it as it trained, where it was measured."""
    for key, title in WATCHED.items():
        if (chart := _curves(found, key, title)) is not None:
            yield chart
    if (chart := adversity(found)) is not None:
        yield chart


def adversity(found: Found) -> Chart | None:
    """What the best trial's perturbation captured as it trained, beside what one that is a batch old could have."""
    if not (rows := share_rows(found)):
        return None
    unit, words = x_of(found), list(SHARES.values())
    colours = alt.Scale(domain=words, range=["var(--best)", "var(--faint)", "var(--accent)"])
    lines = alt.Chart(alt.Data(values=rows)).mark_line(point=alt.OverlayMarkDef(size=28), strokeWidth=2)
    return marks.wide(
        lines.encode(
            alt.X(f"{unit}:Q", title=unit, scale=marks.snug()),
            alt.Y("share:Q", title="share of the best trial's sharpness", scale=alt.Scale(zero=True)),
            alt.Color("what:N", title=None, scale=colours),
            tooltip=[alt.Tooltip("what:N"), alt.Tooltip(f"{unit}:Q"), alt.Tooltip("share:Q", format=".3f")],
        )
    )


def front(found: Found) -> Iterator[Chart]:
    """The first objective beside each other one, and the trials than which none is better in both."""
    rows = trial_rows(found)
    for other in found.objectives[1:]:
        values = [row[other.metric] for row in rows if row[other.metric] is not None]
        if len(values) < 2:
            continue
        # What costs most is what trains longest, and no outlier.
        ends = None if other.metric in COSTS else window(values, other)
        across = alt.X(f"{other.metric}:Q", title=other.metric, scale=marks.between(ends))
        on_front = alt.Color(
            "front:N",
            title=None,
            scale=alt.Scale(domain=["on the front", "others"], range=["var(--best)", "var(--faint)"]),
        )
        base = alt.Chart().transform_calculate(front="datum.front ? 'on the front' : 'others'")
        points = base.mark_circle(opacity=0.85, size=60 if marks.are_few(rows) else 28).encode(
            across, marks.value(found, rows), on_front, tooltip=marks.tooltip(found)
        )
        layers = [points]
        if len(found.objectives) == 2 and len(found.front) > 1:
            steps: Any = "step-after" if not other.greater_is_better else "step-before"
            line = alt.Chart().transform_filter("datum.front").mark_line(interpolate=steps, color="var(--best)")
            layers.insert(0, line.encode(across, marks.value(found, rows)))
        yield marks.wide(alt.layer(*layers, data=alt.NamedData(name=TRIALS)))


def finalists(found: Found) -> Chart | None:
    """Each finalist's mean on fresh seeds with its interval, beside its single run in the search."""
    if found.verdict is None:
        return None
    told = found.verdict.finalists
    rows = [
        {"trial": f"trial {one.trial}", "mean": one.mean, "low": one.low, "high": one.high, "single": one.single}
        for one in told
    ]
    base, y = alt.Chart(alt.Data(values=rows)), alt.Y("trial:N", sort=None, title=None)
    scale = alt.Scale(zero=False)
    tooltip = [alt.Tooltip("trial:N")] + [
        alt.Tooltip(f"{key}:Q", title=title, format=".4g")
        for key, title in (("mean", "mean of fresh seeds"), ("low", "from"), ("high", "to"), ("single", "single run"))
    ]
    x = alt.X("mean:Q", title=found.metric, scale=scale)
    ends = base.mark_rule(color="var(--accent)", strokeWidth=2).encode(alt.X("low:Q", scale=scale), y, x2="high:Q")
    means = base.mark_circle(color="var(--accent)", size=90, opacity=1).encode(x, y, tooltip=tooltip)
    single = base.mark_point(color="var(--best)", filled=False, size=70, strokeWidth=1.5)
    singles = single.encode(alt.X("single:Q", scale=scale), y, tooltip=tooltip)
    return marks.wide(alt.layer(ends, means, singles), 34 * len(rows) + 20)


def costs(found: Found) -> Iterator[Chart]:
    """What the trials' time and memory bought."""
    rows = trial_rows(found)
    for key, title in (("train_runtime", "seconds of training"), ("gpu_memory_gib", "GiB of GPU memory")):
        values = [row[key] for row in rows if key in row]
        if len(set(values)) > 1 and len(values) >= FEWEST:
            across = alt.X(f"{key}:Q", title=title, scale=marks.snug())
            yield marks.wide(
                marks.by_status(alt.Chart(alt.NamedData(name=TRIALS)), rows).encode(
                    across, marks.value(found, rows), marks.status(rows, None), tooltip=marks.tooltip(found)
                ),
                240,
            )


def against(one: Found, other: Found) -> Chart | None:
    """The best so far of two searches, trial by trial."""
    rows: list[Row] = []
    for found in (one, other):
        rows += [{**row, "study": found.name} for row in best_so_far(found)]
    if one.objective != other.objective or len({row["study"] for row in rows}) < 2:
        return None
    ends = window([row["value"] for row in rows], one.objective)
    line = alt.Chart(alt.Data(values=rows)).mark_line(interpolate="step-after", strokeWidth=2, clip=True)
    return marks.wide(
        line.encode(
            alt.X("trial:Q", title="trial, in the order of the search", axis=alt.Axis(format="d", tickMinStep=1)),
            alt.Y("value:Q", title=f"best {one.metric} so far", scale=marks.between(ends)),
            alt.Color(
                "study:N",
                title=None,
                scale=alt.Scale(domain=[one.name, other.name], range=["var(--accent)", "var(--best)"]),
            ),
            tooltip=[alt.Tooltip("study:N"), alt.Tooltip("trial:Q"), alt.Tooltip("value:Q", format=".4g")],
        )
    )


def _curves(found: Found, key: str, title: str) -> Chart | None:
    rows = [row for row in evaluation_rows(found) if row.get(key) is not None]
    if len(rows) == len({row["trial"] for row in rows}):  # not one trial has two
        return None
    values, unit = [row[key] for row in rows], x_of(found)
    y = alt.Y(f"{key}:Q", title=title, scale=marks.between(window(values, found.objective)))
    if key != "value":
        y = marks.positive(key, title, values)
    many = not marks.are_few([row for row in rows if row["last"]])
    base = (
        alt.Chart()
        .transform_filter(f"isValid(datum.{key})")
        .encode(
            alt.X(f"{unit}:Q", title=unit, scale=marks.snug()),
            y,
            marks.status(rows),
            tooltip=[
                alt.Tooltip("trial:Q"),
                alt.Tooltip("status:N"),
                alt.Tooltip(f"{unit}:Q"),
                alt.Tooltip(f"{key}:Q", title=title, format=".4g"),
            ],
        )
    )
    lines = base.mark_line(clip=True).encode(
        detail="trial:N",
        opacity=alt.when(marks.IS_BEST).then(alt.value(1)).otherwise(alt.value(0.4 if many else 0.85)),
        strokeWidth=alt.when(marks.IS_BEST).then(alt.value(2.5)).otherwise(alt.value(1 if many else 1.5)),
    )
    ends = base.transform_filter("datum.last").mark_circle(size=14 if many else 28, opacity=0.7)
    return marks.wide(alt.layer(lines, ends, data=alt.NamedData(name=EVALUATIONS)))


def _is_told(key: str, rows: Sequence[Row]) -> bool:
    """Whether enough trials have the setting, and not all the same value of it."""
    values = [row[key] for row in rows if key in row]
    return len(values) >= FEWEST and len(set(values)) > 1


def _pairs(found: Found, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The pairs of settings that are worth a picture: those with a name, and the two that mattered most."""
    told = [key for key in found.settings if _is_told(key, rows)]
    pairs = [pair for pair in PAIRS if all(key in told for key in pair)]
    mattered = [key for key in told if key in map(setting_of, found.importances.shares)]
    two = (mattered + [key for key in told if key not in mattered])[:2]
    if len(two) == 2 and set(two) not in [set(pair) for pair in pairs] and (mattered or not pairs):
        numbers = sorted(two, key=lambda key: Axis(key, found).levels is not None)
        pairs.append((numbers[0], numbers[1]))
    return pairs


def _readable(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Of many ticks the first, the last and some between."""
    step = max(1, len(ticks) // 6)
    return [tick for index, tick in enumerate(ticks) if index % step == 0 or index == len(ticks) - 1]
