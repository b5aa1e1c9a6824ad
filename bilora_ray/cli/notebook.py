"""A picture in a notebook: one output of its cell, drawn anew in its place. It needs no widgets."""

from __future__ import annotations

import threading
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.jupyter import JUPYTER_HTML_FORMAT

# A notebook keeps what was drawn last; more often would only make its browser work.
EVERY_S = 1.0
# Characters a line, as many as a cell of a narrow window shows.
WIDTH = 100


class NotebookLive:
    """Shows `picture` below the cell that runs, from `start` to `stop`, as rich's `Live` does on a terminal.

    Args:
        picture: drawn anew each second.
    """

    def __init__(self, picture: RenderableType) -> None:
        self._picture = picture
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)
        self._handle: Any = None

    def start(self) -> None:
        """Draw, and go on to."""
        from IPython.display import display

        self._handle = display(drawn(self._picture), raw=True, display_id=True)
        self._thread.start()

    def stop(self) -> None:
        """Draw for the last time."""
        self._ended.set()
        self._thread.join()
        self._handle.update(drawn(self._picture), raw=True)

    def _redraw(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._handle.update(drawn(self._picture), raw=True)


def drawn(picture: RenderableType) -> dict[str, str]:
    """`picture` as a notebook takes it: with colours, and as text for who has none."""
    console = Console(file=StringIO(), width=WIDTH, record=True, force_jupyter=False, force_terminal=True)
    console.print(picture)
    html = console.export_html(inline_styles=True, code_format=JUPYTER_HTML_FORMAT, clear=False)
    return {"text/html": html, "text/plain": console.export_text()}
