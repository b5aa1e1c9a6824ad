"""What a section of a page is made of: texts, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bilora_ray.report.marks import Chart


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Text as it is typed."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Drawn:
    """A chart."""

    chart: Chart
    kind: str = "chart"


@dataclass(frozen=True)
class Image:
    """A picture that is drawn already.

    Attributes:
        png: its bytes.
        told: what it shows, for who does not see it.
    """

    png: bytes
    told: str
    kind: str = "image"

    @property
    def address(self) -> str:
        """The picture itself, so that the page asks for nothing."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class Pictures:
    """Charts beside one another, where there is room."""

    charts: Sequence[Chart]
    kind: str = "pictures"


@dataclass(frozen=True)
class Table:
    """Rows of cells: texts, or numbers that `in_short` tells.

    Attributes:
        columns: their names.
        rows: of as many cells.
        plain: whether its texts are shown as they are, line by line.
        marked: the row that is the best.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    plain: bool = False
    marked: int | None = None
    kind: str = "table"

    def is_of_numbers(self, column: int) -> bool:
        """Whether a column holds numbers, and nothing else that is not empty."""
        cells = [row[column] for row in self.rows if row[column] not in (None, "")]
        return bool(cells) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


Block = Text | Code | Image | Drawn | Pictures | Table
