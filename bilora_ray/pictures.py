"""What pictures on paper share, which a PNG is for: their look, in the colours of the report's page by day."""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, SOFT, LINE = "#2f6fde", "#d9730d", "#5b6472", "#dde1e7"
LOOK: dict[str, Any] = {
    "background": "#ffffff",
    "padding": 16,
    "view": {"stroke": None},
    "axis": {"gridColor": LINE, "domainColor": LINE, "tickColor": LINE, "labelColor": SOFT, "titleColor": SOFT},
    "axisX": {"grid": False, "labelFlush": False},
    "axisY": {"domain": False, "ticks": False},
    "title": {"anchor": "start", "frame": "group", "fontSize": 13, "fontWeight": 600},
}
SCALE = 2


def png(chart: Any, **look: Any) -> bytes:
    """A chart of Altair as a PNG, twice as large as its numbers say.

    Args:
        chart: with its title.
        look: what it has in place of `LOOK`, by key.
    """
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(chart.configure(**{**LOOK, **look}).to_dict(), scale=SCALE))
