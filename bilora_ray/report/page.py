"""A page of what studies found: one file, which asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from bilora_ray import __version__
from bilora_ray.files import atomic_file
from bilora_ray.report import charts, marks
from bilora_ray.report.blocks import Block, Drawn, Pictures
from bilora_ray.report.found import Found, read
from bilora_ray.report.rows import evaluation_rows, trial_rows
from bilora_ray.report.sections import SECTIONS, headline
from bilora_ray.search.study.view import StudyView
from bilora_ray.words import in_short, setting_in_short

PARTS = Path(__file__).parent
# What the bundle of Vega hands to the page.
ENTRY = "window.vegaEmbed = vegaEmbed;"
# By this, near its beginning, a page is known: page.html.
GENERATOR, LENGTH_OF_HEAD = b'<meta name="generator" content="bilora-ray ', 4096


def write_report(studies: Sequence[StudyView], file: Path, ended: Collection[int] = ()) -> None:
    """Write the page of a study, or of two side by side.

    Args:
        studies: one or two.
        file: the page.
        ended: as `read` takes it.

    Raises:
        OSError: it cannot be written.
    """
    text = page([read(study, ended) for study in studies])
    with atomic_file(file) as opened:
        opened.write(text)


def is_page(file: Path) -> bool:
    """Whether `file` holds a page of ours, which may be written anew. OSError where it cannot be read."""
    with file.open("rb") as opened:
        return GENERATOR in opened.read(LENGTH_OF_HEAD)


def page(studies: Sequence[Found]) -> str:
    """The page as HTML. Whatever stands in a study is text on it, never markup nor a program."""
    drawn: list[dict[str, Any]] = []

    def placed(index: int, block: Block) -> dict[str, Any]:
        """A block as the template has it; its charts are numbers of those drawn."""
        if not isinstance(block, Drawn | Pictures):
            return {"kind": block.kind, "block": block}
        numbers = []
        for chart in [block.chart] if isinstance(block, Drawn) else block.charts:
            numbers.append(len(drawn))
            drawn.append({"study": index, "spec": _spec(chart)})
        return {"kind": block.kind, "charts": numbers}

    sections = []
    both = charts.against(*studies) if len(studies) == 2 else None
    together = None if both is None else placed(0, Drawn(both))
    for section in SECTIONS:
        shown = [[placed(index, block) for block in section.blocks(found)] for index, found in enumerate(studies)]
        if any(shown):
            sections.append({"key": section.key, "title": section.title, "studies": shown})
    rows = [_rows(found) for found in studies]
    script, style = _bundle() + "\n" + (PARTS / "page.js").read_text(encoding="utf-8"), _style()
    environment = Environment(loader=PackageLoader("bilora_ray.report", "."), autoescape=True, trim_blocks=True)
    environment.filters |= {"cell": _cell, "order": _order}
    return environment.get_template("page.html").render(
        studies=studies,
        names=[found.name for found in studies],
        headlines=[headline(found) for found in studies],
        together=together,
        sections=sections,
        drawn={"charts": drawn, "rows": rows, "config": marks.CONFIG},
        script=Markup(script),
        style=Markup(style),
        allowed=_digest(script),
        version=__version__,
    )


def _spec(chart: marks.Chart) -> dict[str, Any]:
    """Vega-Lite, without a look of its own and without the address of its schema."""
    return {key: value for key, value in chart.to_dict().items() if key not in ("config", "$schema")}


def _rows(found: Found) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    return {marks.TRIALS: trial_rows(found), marks.EVALUATIONS: evaluation_rows(found)}


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    import vl_convert

    return vl_convert.javascript_bundle(ENTRY)


def _style() -> str:
    return (PARTS / "page.css").read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """What the page's policy lets run: this script, and no other (https://www.w3.org/TR/CSP3/#source-list-syntax)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _cell(value: Any) -> str:
    """A cell in few characters."""
    if isinstance(value, float):
        return in_short(value)
    return "" if value is None else setting_in_short(value)


def _order(value: Any) -> str:
    """What a column is sorted by: the number itself, where there is one."""
    return json.dumps(value) if isinstance(value, int | float) and not isinstance(value, bool) else _cell(value)
