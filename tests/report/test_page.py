"""The page of a study: what it says, of studies of every kind, and that a stranger's text stays text on it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from studies import SPACE, curve, simulated
from tiny_trials import next_trial

from bilora_ray.cli.main import main
from bilora_ray.records import Status
from bilora_ray.report import charts
from bilora_ray.report.found import Found, read
from bilora_ray.report.page import page
from bilora_ray.report.rows import BEST, SHARES, axes, evaluation_rows, share_rows, trial_rows, window
from bilora_ray.report.sections import SECTIONS, headline
from bilora_ray.search.simulated import simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import begin
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.words import in_short

VERSIONS = sorted((Path(__file__).resolve().parents[1] / "versions").glob("[0-9]*"))
EVIL = "</script><script>window.evil = 1</script>&amp;<img src=x onerror=alert(1)>"


class Read(HTMLParser):
    """What a page says and asks for: its texts, its tags, and what lies in its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style" and data.strip():
            self.texts.append(data.strip())

    @property
    def ids(self) -> list[str]:
        """The sections that are there."""
        return [str(attrs["id"]) for tag, attrs in self.tags if tag == "section" and "id" in attrs]

    @property
    def drawn(self) -> dict[str, Any]:
        """What the charts are drawn of."""
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A search of 16 trials."""
    return read(simulated(tmp_path_factory.mktemp("searched"), trials=16))


def test_the_page_says_what_the_search_found(searched: Found) -> None:
    shown, best = Read(page([searched])), searched.best
    assert best is not None
    assert searched.name in shown.texts
    assert in_short(best.value) in shown.texts
    assert "learning_rate" in shown.texts
    assert shown.ids == [
        *("trials", "history", "mattered", "slices", "maps", "parallel", "curves", "flatness", "costs"),
        *("made-of", "commands"),
    ]
    rows = [attrs for tag, attrs in shown.tags if tag == "tr"]
    assert len(rows) > len(searched.records)
    assert any("bilora-ray export simulated --storage-path" in text for text in shown.texts)


def test_every_chart_has_the_rows_that_it_names(searched: Found) -> None:
    drawn = Read(page([searched])).drawn
    assert len(drawn["charts"]) == len(re.findall(r"data-chart=\"\d+\"", page([searched])))
    for chart in drawn["charts"]:
        spec = chart["spec"]
        names = [part["data"]["name"] for part in (spec, *spec.get("layer", ())) if "name" in part.get("data", {})]
        assert names or spec.get("datasets") or spec["data"].get("values")
        for name in names:
            assert drawn["rows"][0].get(name) or spec["datasets"][name]


def test_what_the_best_trial_s_perturbation_captured_is_drawn(searched: Found) -> None:
    assert searched.best is not None
    rows, drawn = share_rows(searched), charts.adversity(searched)
    assert [row["share"] for row in rows if row["what"] == SHARES["captured_sharpness"]] == [
        pytest.approx(told["captured_sharpness"], rel=1e-5)
        for told in searched.best.history
        if "captured_sharpness" in told
    ]
    assert drawn is not None
    assert drawn.to_dict()["encoding"]["color"]["scale"]["domain"] == list(SHARES.values())
    assert drawn.to_dict() in [chart.to_dict() for chart in charts.watched(searched)]
    history = [{key: value for key, value in told.items() if key not in SHARES} for told in searched.best.history]
    untold = replace(searched, records=[replace(record, history=history) for record in searched.records])
    assert charts.adversity(untold) is None


def test_the_best_is_drawn_last_and_stopped_trials_are_told_apart(searched: Found) -> None:
    rows, evaluations = trial_rows(searched), evaluation_rows(searched)
    assert rows[-1]["status"] == evaluations[-1]["status"] == BEST
    assert {row["status"] for row in rows} == {BEST, "complete", "stopped early"}
    assert sum(row["last"] for row in evaluations) == len(searched.records)


def test_what_lies_far_from_most_lies_at_the_edge(searched: Found) -> None:
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 1e30]
    ends = window(values, searched.objective)
    assert ends is not None
    assert ends[0] == 1.0
    assert ends[1] == 1.9
    assert window([2.0, 2.0], searched.objective) is None
    assert window([1.0, 2.0, 3.0], searched.objective) == (1.0, 3.0)


def test_settings_are_laid_out_as_the_space_has_them(searched: Found) -> None:
    found = axes(searched)
    assert found["rank"].levels == ["4", "8", "16"]
    assert found["learning_rate"].log
    assert found["learning_rate"].scaled(3e-4) == 0
    assert found["learning_rate"].scaled(3e-2) == pytest.approx(1)
    assert found["learning_rate"].scaled(3e-3) == pytest.approx(0.5)
    assert searched.settings[0] == "learning_rate"  # which decides most here


def test_two_settings_are_those_by_name_and_those_that_mattered(searched: Found) -> None:
    pairs = charts._pairs(searched, trial_rows(searched))
    assert pairs[:2] == [("rho", "auxiliary_rank"), ("rank", "auxiliary_rank")]
    assert "learning_rate" in pairs[2]


def test_a_value_that_is_no_number_breaks_nothing(searched: Found) -> None:
    bad = replace(searched.records[0], value=float("nan"), history=[{"step": 1, "max_steps": 2, "eval_loss": 1e400}])
    drawn = Read(page([replace(searched, records=[bad, *searched.records[1:]])])).scripts[0]
    assert "NaN" not in drawn
    assert "Infinity" not in drawn


@pytest.mark.parametrize("where", ["prompt", "setting", "error", "name", "baseline"])
def test_a_strangers_text_is_text(searched: Found, where: str) -> None:
    found, first = searched, searched.records[0]
    if where == "prompt":
        found = replace(found, examples=[{"prompt": EVIL, "expected": "1", "adapter": EVIL, "base_model": "2"}])
    elif where == "setting":
        records = [replace(one, sampled={**one.sampled, "rank": EVIL}) for one in found.records]
        found = replace(found, records=records)
    elif where == "error":
        failed = replace(first, status=Status.FAILED, error=EVIL)
        found = replace(found, records=[failed, *found.records[1:]])
    elif where == "name":
        study = found.space.study.model_copy(update={"name": EVIL})
        found = replace(found, space=replace(found.space, study=study), space_file=EVIL)
    else:
        found = replace(found, made_with={EVIL: EVIL})
    html = page([found])
    plain, shown = Read(page([searched])), Read(html)
    kinds = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in shown.tags} <= kinds | {"td", "tr", "thead", "th"}
    assert len(shown.scripts) == len(plain.scripts) == 2
    assert "window.evil" not in shown.scripts[1]
    assert [attrs for _, attrs in shown.tags if any(key.startswith("on") for key in attrs)] == []
    assert "<script>window.evil" not in html


def test_the_page_asks_for_nothing_and_runs_nothing_else(searched: Found) -> None:
    shown = Read(page([searched]))
    asking = [attrs for _, attrs in shown.tags if {"src", "srcset", "action"} & attrs.keys()]
    links = [str(attrs["href"]) for tag, attrs in shown.tags if tag in ("a", "link")]
    assert asking == []
    assert links
    assert all(link.startswith("#") for link in links)
    policies = [attrs["content"] for tag, attrs in shown.tags if "http-equiv" in attrs]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in str(policies[0])


def test_a_page_of_a_thousand_trials_is_small(searched: Found) -> None:
    many = [replace(searched.records[n % len(searched.records)], number=n) for n in range(1000)]
    html = page([replace(searched, records=many)])
    assert len(html.encode("utf-8")) < 5e6
    drawn = Read(html).drawn["rows"][0]
    assert len(drawn["trials"]) == 1000
    assert len(drawn["evaluations"]) <= 12_000


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    objectives = "study.objectives=[{metric: eval_loss}, {metric: train_runtime}]"
    found = read(simulated(tmp_path, objectives, trials=5))
    shown = Read(page([found]))
    assert "front" in shown.ids
    assert "yes" in shown.texts
    assert any("on the Pareto front" in line for line in headline(found).lines)


def test_finalists_give_the_score_its_interval(tmp_path: Path) -> None:
    simulated(tmp_path, "study.finalists=2", "study.finalist_seeds=2", trials=3)
    layout = Layout(tmp_path)
    study = open_study(load_study(layout, "simulated").space, layout, {})
    try:
        found = begin(study, {})
        assert found is not None
        finals = open_study(found[0], layout, {})
        simulate(finals, curve)
        finals.release()
    finally:
        study.release()
    told = read(load_study(layout, "simulated"))
    head = headline(told)
    assert told.finals is not None
    assert told.finals.verdict is not None
    assert head.value == f"{told.finals.verdict.score:.4g}"
    assert " to " in head.range
    assert "finalists" in Read(page([told])).ids
    # Of the finalists' own study nothing is the best.
    own = read(load_study(layout, told.finals.study.space.study.name))
    assert headline(own).value == ""
    assert "finalists of study 'simulated'" in headline(own).lines[0]
    shown = Read(page([own])).ids
    assert shown[0] == "trials"
    # It searches nothing.
    assert {"history", "slices"} <= set(Read(page([told])).ids)
    assert {"history", "mattered", "slices", "maps", "parallel"}.isdisjoint(shown)


def test_what_it_gains_over_no_training_is_said(searched: Found) -> None:
    assert searched.best is not None
    assert searched.best.value is not None
    gain = 9.0 - searched.best.value
    told = replace(searched, baseline={"kind": "base-model", "eval_loss": 9.0})
    assert f"Without training it is 9 (the base model alone): that is {gain:.4g} better." in headline(told).lines
    unknown = replace(searched, baseline={"kind": "base-model", "eval_loss": float("nan")})
    for found in (searched, unknown):
        assert not any("training" in line for line in headline(found).lines)


def test_failures_are_counted_by_cause(searched: Found) -> None:
    failed = [
        replace(one, status=Status.FAILED, error=f"the loss is nan at step {one.number}")
        for one in searched.records[:3]
    ]
    other = replace(searched.records[3], status=Status.FAILED, error="out of memory")
    found = replace(searched, records=[*failed, other, *searched.records[4:]])
    blocks = {section.key: list(section.blocks(found)) for section in SECTIONS}
    (table,) = blocks["failures"]
    assert [row[0] for row in table.rows] == [3, 1]  # type: ignore[union-attr]
    assert table.rows[0][2] == "0, 1, 2"  # type: ignore[union-attr]


def test_a_study_of_one_trial_has_no_empty_charts(tmp_path: Path) -> None:
    found = read(simulated(tmp_path, trials=1))
    ids = Read(page([found])).ids
    assert ids == ["trials", "curves", "flatness", "costs", "made-of", "commands"]


def test_a_study_that_has_only_begun(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    study = open_study(load_space(None, [*SPACE, "study.name=s", "study.num_trials=3"]), layout, {})
    found = read(load_study(layout, "s"))
    assert headline(found).lines == ["No trial is complete yet."]
    assert Read(page([found])).ids == ["made-of", "commands"] or "costs" in Read(page([found])).ids
    number = next_trial(study)
    assert number is not None
    running = read(load_study(layout, "s"))
    assert ("state", "still running as this was written") in headline(running).facts
    # Whoever has run it knows that it goes on no more.
    ended = read(load_study(layout, "s"), ended=[number])
    assert ended.records[0].status is Status.INTERRUPTED
    assert Read(page([running])).ids[0] == "trials"
    study.release()


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_the_page_of_an_old_study(version: Path, tmp_path: Path) -> None:
    shutil.copytree(version / "runs", tmp_path / "runs")
    before = (tmp_path / "runs/studies.db").read_bytes()
    result = CliRunner().invoke(main, ["report", "small", f"--storage-path={tmp_path / 'runs'}"])
    assert result.exit_code == 0, result.output
    shown = Read((tmp_path / "runs/studies/small/report.html").read_text(encoding="utf-8"))
    facts = json.loads((version / "facts.json").read_text(encoding="utf-8"))
    best = facts["trials"][facts["best"]]
    assert in_short(best["eval_loss"]) in shown.texts
    assert "failures" in shown.ids
    assert (tmp_path / "runs/studies.db").read_bytes() == before


def test_two_studies_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        simulated(tmp_path / "runs", f"study.seed={seed}", name=name, trials=3)
    result = CliRunner().invoke(main, ["report", "one", "--compare", "two"])
    assert result.exit_code == 0, result.output
    assert result.output == "Report   one-two.html\n"
    assert CliRunner().invoke(main, ["report", "one", "--compare", "two"]).exit_code == 0  # written anew
    shown = Read(Path("one-two.html").read_text(encoding="utf-8"))
    assert shown.texts.count("one") > 1
    assert shown.texts.count("two") > 1
    assert "Side by side" in shown.texts
    assert len(shown.drawn["rows"]) == 2
    assert {chart["study"] for chart in shown.drawn["charts"]} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nobody"], "study 'nobody': not in"),
        (["one", "--compare", "one"], "--compare one: is the study itself; name another one"),
        (["one", "--compare", "onne"], "study 'onne': not in"),
        (["one", "--output", "missing/page.html"], "missing/page.html: cannot be written"),
        (["one", "--output", "notes.txt"], "notes.txt: exists, and is no page of a study; name another file with"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    study = open_study(load_space(None, [*SPACE, "study.name=one"]), Layout(tmp_path / "runs"), {})
    next_trial(study)
    study.release()
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("**/*.html"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
