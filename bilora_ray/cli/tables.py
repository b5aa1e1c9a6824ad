"""Trials in a table, as wide as the terminal allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bilora_ray.words import setting_in_short

# Longer names are broken behind an underscore: the numbers below them are short.
HEADER_WIDTH = 10
# Characters of a quoted text that are shown, at its start and at its end.
QUOTED = 200


class TrialTable:
    """A table of trials; where its columns are too many for the terminal, a trial's settings share one.

    Args:
        columns: names of what all trials have.
    """

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []

    def add(self, *cells: str, sampled: Mapping[str, Any]) -> None:
        """Add a trial: what belongs to `columns`, and the settings that the search chose."""
        self.rows.append((cells, sampled))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich asks for it."""
        wide = self._wide()
        needs = Measurement.get(console, options.update_width(10_000), wide).maximum
        yield wide if needs <= options.max_width else self._narrow()

    def _wide(self) -> Table:
        keys = list(dict.fromkeys(key for _, sampled in self.rows for key in sampled))
        table = self._table()
        for key in keys:
            table.add_column(_broken(key), justify="right", no_wrap=True)
        for cells, sampled in self.rows:
            table.add_row(*cells, *(_setting(sampled[key]) if key in sampled else Text() for key in keys))
        return table

    def _narrow(self) -> Table:
        table = self._table()
        table.add_column("settings", overflow="fold")
        for cells, sampled in self.rows:
            table.add_row(*cells, Text("  ").join(Text(f"{key}=") + _setting(value) for key, value in sampled.items()))
        return table

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for name in self.columns:
            table.add_column(_broken(name), justify="left" if name == "status" else "right", no_wrap=True)
        return table


def in_quotes(text: str) -> str:
    """`text` in quotes, where its spaces and line ends are seen; of a long one the start and the end."""
    return repr(text if len(text) <= 2 * QUOTED else f"{text[:QUOTED]} ... {text[-QUOTED:]}")


def _setting(value: Any) -> Text:
    """A setting's value in as few characters as tell it; not markup, which a template may look like."""
    return Text(setting_in_short(value))


def _broken(name: str) -> str:
    lines = [""]
    for part in name.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1] + part) > HEADER_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
