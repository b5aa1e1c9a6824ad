"""The tables of docs/data.md: each kind of file and of chat that the tests try, and what happens to it.

python tests/data_table.py      writes them anew, between the comments that begin and end each
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training import chat_cases, file_cases

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
HEAD = ("| what | with | what happens |", "| --- | --- | --- |")


def tables() -> dict[str, str]:
    """The tables, by name."""
    return {"files": _table(map(_of_file, file_cases.CASES)), "chats": _table(map(_of_chat, chat_cases.CASES))}


def page_with(text: str, found: Mapping[str, str]) -> str:
    """The page of which `text` is one version, with the tables that were `found`."""
    for name, table in found.items():
        between = re.compile(f"(<!-- {name} -->\n).*(<!-- end of {name} -->)", re.DOTALL)
        text = between.sub(lambda marks, table=table: f"{marks[1]}{table}{marks[2]}", text)  # type: ignore[misc]
    return text


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    return "".join(f"{line}\n" for line in (*HEAD, *(f"| {' | '.join(row)} |" for row in rows)))


def _of_file(case: file_cases.Case) -> tuple[str, str, str]:
    outcome = case.outcome
    if isinstance(outcome, file_cases.Refused):
        return case.id, _settings(case.settings), f"is refused: {_code(_named(outcome.line))}"
    notes = [f"Note: {_code(_named(note))}" for note in outcome.notes]
    return case.id, _settings(case.settings), "; ".join(["loads", *notes])


def _of_chat(case: chat_cases.Case) -> tuple[str, str, str]:
    if case.refused:
        return case.id, _settings(case.settings), f"is refused: {_code(case.says[0])}"
    learned = "; ".join(" and ".join(map(_code, turns)) for turns in case.learned)
    notes = [f"Note: {_code(note)}" for note in case.says]
    return case.id, _settings(case.settings), "; ".join([f"learns {learned}", *notes])


def _named(line: str) -> str:
    """A line of an error with names in place of those of a test's folder."""
    return line.replace("{here}", "data").replace("{}", "FILE")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(_code(f"{key}: {_yaml(value)}") for key, value in settings.items())


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) else json.dumps(value)


def _code(text: str) -> str:
    """`text` in a cell: a tick or a bar in it would end the code or the cell."""
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("|", "\\|")
    return f"``{text}``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
