"""The page in a browser, where there is one: it draws all, asks for nothing, fits a telephone, runs nothing strange."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import simulated

from bilora_ray.report.found import Found, read
from bilora_ray.report.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        # As root, as in a container, Chromium has no sandbox.
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a search, in which strangers have had their say."""
    folder = tmp_path_factory.mktemp("page")
    found = read(simulated(folder, trials=12))
    file = folder / "report.html"
    file.write_text(page([_with_strangers(found)]), encoding="utf-8")
    return file


def _with_strangers(found: Found) -> Found:
    examples = [{"prompt": EVIL, "expected": EVIL, "adapter": "1", "base_model": "2"}]
    records = [replace(one, sampled={**one.sampled, "rank": EVIL}) for one in found.records]
    return replace(found, records=records, examples=examples, made_with={EVIL: EVIL})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_draws_all_and_asks_for_nothing(browser: Any, file: Path, width: int, scheme: str) -> None:
    shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(file.as_uri())
    shown.wait_for_selector("html[data-drawn]")
    assert said == []
    assert asked == [file.as_uri()]
    assert shown.locator("[data-chart]").count() == shown.locator("[data-chart] svg").count() > 8
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.evaluate("window.evil") is None
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    shown.close()


def test_a_column_sorts_and_a_point_says_what_it_is(browser: Any, file: Path) -> None:
    shown = browser.new_page(viewport={"width": 1280, "height": 800})
    shown.goto(file.as_uri())
    shown.wait_for_selector("html[data-drawn]")
    trials = shown.locator("#trials th", has_text="trial").first
    for falling in (False, True):
        trials.click()
        numbers = [int(text) for text in shown.locator("#trials tbody td:first-child").all_inner_texts()]
        assert numbers == sorted(numbers, reverse=falling)
        assert len(numbers) == 12
    shown.locator("#history path[aria-roledescription=circle]").last.hover()
    told = shown.locator("#vg-tooltip-element").inner_text()
    assert "learning_rate" in told
    assert EVIL.partition(">")[0] in told  # as text
    assert shown.evaluate("window.evil") is None
    shown.close()
