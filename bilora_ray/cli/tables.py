"""Trials in a table, as wide as the terminal allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    No setting's name and no number is broken within a word of it.

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

        def room(table: Table) -> Measurement:
            return Measurement.get(console, options.update_width(10_000), table)

        for name in (str, _broken):
            if room(wide := self._wide(name)).maximum <= options.max_width:
                yield wide
                return
        narrow = self._narrow()
        if room(narrow).minimum <= options.max_width:
            yield narrow
        else:
            yield self._bare()
            yield from self._below()

    def _wide(self, name: Callable[[str], str]) -> Table:
        keys = list(dict.fromkeys(key for _, sampled in self.rows for key in sampled))
        table = self._table(name)
        for key in keys:
            table.add_column(name(key), justify="right", no_wrap=True)
        for cells, sampled in self.rows:
            table.add_row(*cells, *(_setting(sampled[key]) if key in sampled else Text() for key in keys))
        return table

    def _narrow(self) -> Table:
        table = self._table(_broken)
        table.add_column("settings", overflow="fold")
        for cells, sampled in self.rows:
            table.add_row(*cells, _settings(sampled))
        return table

    def _bare(self) -> Table:
        table = self._table(_broken)
        for cells, _ in self.rows:
            table.add_row(*cells)
        return table

    def _below(self) -> Iterator[Text]:
        """A line a trial of its settings, for a terminal where no column is as wide as one of them."""
        for cells, sampled in self.rows:
            if sampled:
                yield Text(f"{self.columns[0]} {cells[0]}  ") + _settings(sampled)

    def _table(self, broken: Callable[[str], str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for name in self.columns:
            table.add_column(broken(name), justify="left" if name == "status" else "right", no_wrap=True)
        return table


def in_quotes(text: str) -> str:
    """`text` in quotes, where its spaces and line ends are seen; of a long one the start and the end."""
    return repr(text if len(text) <= 2 * QUOTED else f"{text[:QUOTED]} ... {text[-QUOTED:]}")


def _setting(value: Any) -> Text:
    """A setting's value in as few characters as tell it; not markup, which a template may look like."""
    return Text(setting_in_short(value))


def _settings(sampled: Mapping[str, Any]) -> Text:
    """Settings with their values, to be broken between two of them."""
    return Text("  ").join(Text(f"{key}=") + _setting(value) for key, value in sampled.items())


def _broken(name: str) -> str:
    lines = [""]
    for part in name.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1] + part) > HEADER_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
