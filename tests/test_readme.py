"""What the documents of the repository point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def _links(text: str) -> list[tuple[str, str]]:
    """File and heading of each link to a file."""
    return [link for link in LINK.findall(text) if "://" not in link[0]]


def _anchors(text: str) -> set[str]:
    """What the headings of a page are reached by."""
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_finds_it(document: Path) -> None:
    for file, heading in _links(document.read_text(encoding="utf-8")):
        found = document.parent / file if file else document
        assert found.exists(), file
        assert not heading or heading in _anchors(found.read_text(encoding="utf-8")), f"{file}#{heading}"


def test_every_page_and_picture_is_reached() -> None:
    linked = {
        (document.parent / file).resolve()
        for document in DOCUMENTS
        for file, _ in _links(document.read_text(encoding="utf-8"))
    }
    docs = ROOT / "docs"
    assert {*docs.glob("*.md"), *docs.glob("images/*")} <= linked
    assert all(picture.stat().st_size < 200_000 for picture in docs.glob("images/*"))


def test_the_first_screen_leads_to_the_idea_in_code_and_shows_a_page() -> None:
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    reached = {file for file, _ in _links(first_screen)}
    assert {"examples/bilora_loop.py", "bilora_ray/method/reference.py", "docs/images/report.png"} <= reached


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220
