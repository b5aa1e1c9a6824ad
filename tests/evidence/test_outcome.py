"""What is said of a comparison: values by hand, words, notes, and what is not known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bilora_ray.cli.tables import TrialTable
from bilora_ray.evidence.outcome import Outcome, Run, Tuned, as_json, as_table, notes, sentences

SEEDS = (11, 12, 13, 14, 15, 16)
LORA = (0.80, 0.82, 0.84, 0.80, 0.82, 0.84)
BETTER = (0.84, 0.87, 0.87, 0.84, 0.87, 0.87)  # by 0.04, 0.05, 0.03, twice
ALIKE = (0.81, 0.81, 0.85, 0.79, 0.83, 0.83)  # 0.01 off, three times each way


def runs(entry: str, qualities: tuple[float | None, ...], step: float = 0.5, **other: Any) -> tuple[Run, ...]:
    known: dict[str, Any] = {"sharpness": 0.25, "memory_gib": None, "train_seconds": 360.0, **other}
    return tuple(
        Run(entry=entry, seed=seed, quality=quality, step_seconds=step * (1 + place), **known)
        for place, (seed, quality) in enumerate(zip(SEEDS, qualities, strict=False))
    )


def tuned(entry: str, **given: Any) -> Tuned:
    known: dict[str, Any] = {"settings": {"learning_rate": 3e-4}, "value": 0.85, "trials": 8, "device_hours": 1.4}
    return Tuned(entry, **{**known, **given})


def outcome(**given: Any) -> Outcome:
    known: dict[str, Any] = {
        "name": "methods",
        "metric": "test_accuracy",
        "greater_is_better": True,
        "baseline": "lora",
        "budget": "steps",
        "runs": runs("bilora", BETTER, 0.55) + runs("lora", LORA) + runs("nbar", ALIKE, 0.51),
        "tuned": (tuned("bilora"), tuned("lora"), tuned("nbar")),
    }
    return Outcome(**{**known, **given})


def test_what_is_better_and_what_is_not_to_be_told_apart() -> None:
    lora, bilora, nbar = sentences(outcome())
    assert lora == "lora: test_accuracy 0.82, mean of 6 runs, standard deviation 0.01789"
    # Student's: 0.04 +- 2.5706 x 0.008944 / sqrt(6) = 0.0306 to 0.0494; the bootstrap's ends are a little farther out.
    assert bilora.startswith("bilora: 0.040 better than lora (95 %: 0.03")
    assert nbar.startswith("nbar: not distinguishable from lora (+0.000; 95 %: -0.01")
    assert [outcome().verdict(entry) for entry in ("lora", "bilora", "nbar")] == [
        "baseline",
        "better",
        "not distinguishable",
    ]


def test_of_a_loss_less_is_better() -> None:
    _, bilora, _ = sentences(outcome(metric="test_loss", greater_is_better=False))
    assert "bilora: 0.040 worse than lora" in bilora
    assert outcome(metric="test_loss", greater_is_better=False).verdict("bilora") == "worse"


def test_how_many_seeds_would_tell_is_said_of_what_is_not_told() -> None:
    slight = (0.81, 0.81, 0.85, 0.81, 0.83, 0.83)  # 0.01 up four times, down twice
    line = sentences(outcome(runs=runs("lora", LORA) + runs("nbar", slight), tuned=()))[1]
    # 0.00333 by a deviation of 0.01033: an effect of 0.3227, of which 78 pairs tell in 80 of 100.
    assert line.endswith("; 78 seeds would tell a difference of this size")
    tiny = tuple(score + (0.01 if place % 2 else -0.00999) for place, score in enumerate(LORA))
    line = sentences(outcome(runs=runs("lora", LORA) + runs("nbar", tiny), tuned=()))[1]
    assert line.endswith("; a difference of this size would take more than 10,000 seeds to tell")


def test_few_pairs_have_no_words_of_certainty() -> None:
    found = outcome(runs=runs("lora", LORA[:3]) + runs("bilora", BETTER[:3]))
    line = sentences(found)[1]
    assert "3 pairs: too few to tell it from lora" in line
    assert "better" not in line
    assert found.verdict("bilora") == "too few pairs"
    assert any(note.startswith("fewer than 5 pairs tell little") for note in notes(found))


def test_without_two_pairs_nothing_is_compared() -> None:
    found = outcome(runs=runs("lora", (None, 0.8)) + runs("bilora", (0.8, 0.8)))
    assert sentences(found)[1] == "bilora: not compared with lora: fewer than two pairs of runs have scores"
    assert as_json(found)["entries"][1]["difference"] is None
    nothing = outcome(runs=())
    assert sentences(nothing)[0] == "lora: no run has a score"
    assert as_json(nothing)["entries"][0]["mean"] is None


def test_times_memory_and_cost_by_hand() -> None:
    found = outcome(price_per_hour=2.5, devices=2)
    assert found.step_time_ratio("bilora") == pytest.approx(1.1)
    assert found.step_time_ratio("lora") == 1.0
    # 1.4 h of tuning, and 6 runs of 0.1 h on two devices.
    assert found.device_hours("bilora") == pytest.approx(2.6)
    assert found.cost("bilora") == pytest.approx(6.5)
    assert outcome().cost("bilora") is None


def test_the_ratio_of_step_times_is_of_pairs_and_their_median() -> None:
    slow = [
        replace(run, step_seconds=run.step_seconds * factor)
        for run, factor in zip(  # type: ignore[operator]
            runs("bilora", BETTER), (1.0, 1.2, 1.3, 1.1, 9.0, 1.15), strict=True
        )
    ]
    slow[0] = replace(slow[0], step_seconds=None)
    found = outcome(runs=runs("lora", LORA) + tuple(slow))
    assert found.step_time_ratio("bilora") == pytest.approx(1.2)  # of 1.1, 1.15, 1.2, 1.3, 9


def test_runs_without_a_score_are_noted() -> None:
    broken = (0.84, None, 0.87, math.nan, 0.87, 0.87)
    found = outcome(runs=runs("lora", LORA) + runs("bilora", broken))
    assert found.differences["bilora"] is not None
    assert found.differences["bilora"].pairs == 4
    (line,) = [note for note in notes(found) if note.startswith("bilora")]
    assert line == (
        "bilora: 2 of 6 runs have no score, and their pairs are left out; if it fails by its settings, what is said of "
        "bilora flatters it"
    )
    columns, rows = as_table(found)
    assert rows[1][0][columns.index("pairs")] == "4"
    assert as_json(found)["entries"][1]["failed"] == 2
    json.dumps(as_json(found), allow_nan=False)


def test_edges_unequal_tuning_and_earlier_looks_are_noted() -> None:
    assert list(notes(outcome())) == []
    told = (tuned("lora", edges=("learning_rate",)), tuned("bilora", trials=7))
    assert list(notes(outcome(tuned=told, extended=True))) == [
        "lora: its best learning_rate (0.0003) is at the edge of its range; a wider one may have better ones",
        "not all were tuned with as many complete trials: lora 8, bilora 7",
        "seeds were added after a look at the outcome of fewer, of which the intervals and p-values do not know",
    ]


def test_an_entry_without_a_run_is_said_to_have_none() -> None:
    found = outcome(tuned=(tuned("lora"), tuned("bilora"), tuned("nbar"), tuned("boom", trials=0, settings={})))
    assert sentences(found)[-1] == "boom: has no runs: no trial of its tuning is complete"
    assert found.verdict("boom") == as_json(found)["entries"][-1]["verdict"] == "no runs"


def test_a_difference_that_may_be_of_another_rate_is_noted() -> None:
    other = {"learning_rate": 1.3e-3, "rho": 0.46}
    told = (tuned("lora"), tuned("bilora", settings=other), tuned("nbar", settings=other))
    assert list(notes(outcome(tuned=told))) == [  # nbar is not told apart
        "bilora: has learning_rate 0.0013, lora learning_rate 0.0003: what tuning chose is one draw, which no interval "
        "knows; a range of that value alone tells more"
    ]


def test_the_same_scores_on_each_seed_are_noted() -> None:
    found = outcome(runs=runs("lora", LORA) + runs("again", LORA), tuned=())
    assert sentences(found)[1].startswith("again: not distinguishable from lora (+0.000; ")
    assert list(notes(found)) == [
        "again: scores on each seed what lora scores; if it is not the same under another name, test_accuracy is too "
        "coarse"
    ]
    assert list(notes(outcome())) == []  # nbar's mean is the same, its scores are not


def test_the_table_has_a_row_an_entry_and_no_empty_column() -> None:
    columns, rows = as_table(outcome())
    assert columns == ("method", "accuracy", "difference", "interval", "Holm_p", "sharpness", "step_time", "hours")
    assert [cells[0] for cells, _ in rows] == ["lora", "bilora", "nbar"]
    assert rows[0][0] == ("lora", "0.82", "", "", "", "0.25", "1", "2")
    assert rows[1][0][1:3] == ("0.86", "+0.040")
    assert rows[1][0][6] == "1.1"
    assert rows[1][1] == {"learning_rate": 3e-4}
    more = outcome(runs=runs("lora", LORA, memory_gib=3.5, forgetting=0.02, adapter_mb=1.5), price_per_hour=1.0)
    assert as_table(more)[0][-5:] == ("step_time", "GiB", "MB", "hours", "cost")
    assert "forgetting" in as_table(more)[0]


def test_the_table_fits_a_terminal() -> None:
    columns, rows = as_table(outcome(price_per_hour=2.0))
    table = TrialTable(*columns)
    for cells, settings in rows:
        table.add(*cells, sampled=settings)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    told = console.export_text()
    assert "…" not in told
    assert "+0.040" in told


def test_json_has_all_of_it_and_nothing_but_json() -> None:
    told = json.loads(json.dumps(as_json(outcome(price_per_hour=2.0)), allow_nan=False))
    assert told["seeds"] == list(SEEDS)
    assert told["metric"] == "test_accuracy"
    assert [entry["verdict"] for entry in told["entries"]] == ["baseline", "better", "not distinguishable"]
    bilora = told["entries"][1]
    assert bilora["mean"] == pytest.approx(0.86)
    assert bilora["difference"]["mean"] == pytest.approx(0.04)
    assert bilora["difference"]["distinguishable"] is True
    assert bilora["tuned"]["settings"] == {"learning_rate": 3e-4}
    assert bilora["cost"] == pytest.approx(4.0)
    assert len(told["runs"]) == 18
    assert told["sentences"] == sentences(outcome())
    assert told["statistics"].startswith("paired by seed")
