"""A draft as the text of a space file: every setting on a line of its own, with what decided it behind it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from bilora_ray.search.drafting.draft import Draft, Line

WIDTH = 120
HEADINGS = {
    "study": "How to search: `bilora-ray settings` lists every key of each section.",
    "trial": "What a trial is: any of it may be a value, {choice: [...]} or {low: ..., high: ..., log: true}.",
    "resources": "What one trial gets.",
}


def written(draft: Draft, schema: str) -> str:
    """The text; `schema` is the file beside it that editors complete it by."""
    lines = [f"# yaml-language-server: $schema={schema}"]
    for told in draft.told:
        lines += _comment(told)
    for note in draft.notes:
        lines += _comment(f"Note: {note}")
    for doubt in draft.doubts:
        lines += _comment(f"Or: {doubt}")
    for section, heading in HEADINGS.items():
        found = [line for line in draft.lines if line.section == section]
        if found:
            lines += ["", f"# {heading}", f"{section}:", *(text for line in found for text in _setting(line))]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    starts = f"{indent}# "
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=starts, subsequent_indent=f"{starts}  ")


def _setting(line: Line) -> Iterator[str]:
    if line.key == "points_to_evaluate":
        yield from _comment(line.comment, "  ") if line.comment else ()
        yield f"  {line.key}:"
        yield from (f"    - {_flow(point)}" for point in line.value)
        return
    text = f"  {line.key}: {_flow(line.value)}"
    if not line.comment:
        yield text
    elif len(text) + len(line.comment) + 4 <= WIDTH:
        yield f"{text}  # {line.comment}"
    else:
        yield from [*_comment(line.comment, "  "), text]


def _flow(value: Any, within: bool = False) -> str:
    """A value on one line, as a person writes it; `within` a list or a mapping, commas and brackets end a bare text."""
    if isinstance(value, str):
        plain = yaml.safe_dump(value, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()
        bare = value and plain == value and not (within and set(value) & set(",[]{}"))
        return value if bare else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key, True)}: {_flow(item, True)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item, True) for item in value) + "]"
    return json.dumps(value)
