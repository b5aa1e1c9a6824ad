"""A picture of how the loss rises around an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from bilora_ray.pictures import BLUE, ORANGE, SOFT, png
from bilora_ray.training.probe.sharpness import Flatness

COLOURS = {"full_space": BLUE, "lora_space": ORANGE}
TITLES = {"full_space": "full space", "lora_space": "LoRA space"}
ALL_ROWS, EACH_BATCH = "all rows together", "each batch by itself, mean by rows"
WIDTH, HEIGHT = 340, 260
LEGEND = {
    "orient": "bottom",
    "labelColor": SOFT,
    "title": None,
    "symbolStrokeWidth": 2,
    "symbolType": "stroke",
    "symbolSize": 400,
    "labelLimit": 300,
}


def picture(found: Mapping[str, Flatness], radii: Sequence[float], title: str) -> bytes:
    """The rises against the radius, as a PNG: along the gradient, and along random directions.

    Args:
        found: what was measured, by space.
        radii: the radii of its rises.
        title: what it is of.
    """
    color = alt.Color("space:N", scale=alt.Scale(domain=[TITLES[one] for one in found], range=_colours(found)))
    panels = alt.hconcat(_adversarial(found, radii, color), _random(found, radii, color), spacing=70, bounds="flush")
    return png(panels.properties(title=alt.TitleParams(title, fontSize=14, offset=14)), legend=LEGEND)


def _adversarial(found: Mapping[str, Flatness], radii: Sequence[float], color: alt.Color) -> Any:
    rows = [
        {"space": TITLES[space], "of": of, "radius": radius, "rise": rise}
        for space, told in found.items()
        for of, rises in ((ALL_ROWS, told.adversarial), (EACH_BATCH, told.m_sharpness))
        for radius, rise in zip((0.0, *radii), (0.0, *rises), strict=True)
    ]
    scale = alt.Scale(domain=[ALL_ROWS, EACH_BATCH], range=[[1, 0], [5, 4]])
    dashes = alt.StrokeDash("of:N", scale=scale, legend=alt.Legend(symbolStrokeColor=SOFT))
    base = alt.Chart(alt.Data(values=rows)).encode(_x("norm of the step"), _y("rise:Q"), color)
    lines = base.mark_line(strokeWidth=2).encode(dashes)
    points = base.mark_circle(size=28, opacity=1).encode(detail="of:N")
    return alt.layer(lines, points).properties(width=WIDTH, height=HEIGHT, title="Along the gradient")


def _random(found: Mapping[str, Flatness], radii: Sequence[float], color: alt.Color) -> Any:
    rows = [
        {"space": TITLES[space], "radius": radius, "rise": mean, "low": low, "high": high}
        for space, told in found.items()
        for radius, mean, low, high in [
            (0.0, 0.0, 0.0, 0.0),
            *zip(radii, told.random.mean, told.random.low, told.random.high, strict=True),
        ]
    ]
    base, x = alt.Chart(alt.Data(values=rows)), _x("length of the step, as a share of each row of weights")
    band = base.mark_area(opacity=0.2).encode(x, _y("low:Q"), alt.Y2("high:Q"), color)
    mean = base.mark_line(point={"size": 28}, strokeWidth=2).encode(x, _y("rise:Q"), color)
    title = "Along random directions, mean and its 95 % interval"
    return alt.layer(band, mean).properties(width=WIDTH, height=HEIGHT, title=title)


def _x(title: str) -> alt.X:
    return alt.X("radius:Q", title=title)


def _y(field: str) -> alt.Y:
    return alt.Y(field, title="rise of the loss", axis=alt.Axis(tickCount=5), scale=alt.Scale(nice=False))


def _colours(found: Mapping[str, Flatness]) -> list[str]:
    return [COLOURS[space] for space in found]
