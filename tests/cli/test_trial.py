"""One trial, all trials as CSV, and those that wait: what `show` and `stop` say and do of them."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from tiny_trials import next_trial

from bilora_ray.cli.main import main
from bilora_ray.cli.tables import TrialTable, _broken
from bilora_ray.config import TrialConfig
from bilora_ray.search.simulated import simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.search.study.study import SearchStudy

SPACE = [
    "study.name=s",
    "study.num_trials=6",
    "model_name_or_path=org/model",
    "task=causal-lm",
    "train_data=org/data",
    "rho={low: 0.01, high: 0.2, log: true}",
    "rank={choice: [4, 8, 16]}",
]
ASHA = ["study.scheduler=asha", "study.grace_period=1", "study.rung_unit=steps", "study.reduction_factor=2"]


def curve(config: TrialConfig) -> list[dict[str, float]]:
    losses = (1 / 3 + float(config.rho) + step for step in (2, 1, 0, 3))
    return [
        {"step": step, "max_steps": 4, "eval_loss": loss, "eval_extra": -loss, "train_runtime": 1.5 * step}
        for step, loss in enumerate(losses, 1)
    ]


def opened(*more: str) -> SearchStudy:
    return open_study(load_space(None, [*SPACE, *more]), Layout(Path("runs").resolve()), {})


def typed(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def said(*words: str) -> str:
    result = typed(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


# --csv


def test_a_csv_has_whole_names_and_whole_numbers_the_best_trial_first() -> None:
    study = opened("study.scheduler=none")
    simulate(study, curve, workers=1, keep=True)
    study.release()
    rows = list(csv.DictReader(StringIO(said("show", "s", "--csv"))))
    assert list(rows[0]) == [
        *("trial", "status", "eval_loss", "eval_extra", "rho", "rank"),
        *("step", "max_steps", "seconds", "parent", "error", "adapter"),
    ]
    losses = [float(row["eval_loss"]) for row in rows]
    assert losses == sorted(losses)
    best = load_study(study.layout, "s").best()
    assert best is not None
    assert (int(rows[0]["trial"]), losses[0], float(rows[0]["rho"])) == (best.number, best.value, best.sampled["rho"])
    # Of the adapter that is kept, which is not that of the last evaluation.
    assert float(rows[0]["eval_extra"]) == -losses[0]
    assert (float(rows[0]["step"]), rows[0]["seconds"], rows[0]["error"]) == (4, "6.0", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--csv"], "--csv: prints the trials of one study"),
        (["s", "--csv", "--json"], "--csv: prints the trials of one study"),
        (["s", "--csv", "--trial", "0"], "--csv: prints the trials of one study"),
        (["--trial", "0"], "--trial: needs the study that it is of"),
        (["s", "--trial", "9"], "study 's': no trial 9; it has 0 to 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(words: list[str], line: str) -> None:
    study = opened()
    next_trial(study)
    study.release()
    result = typed("show", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --trial


def test_a_trial_says_why_it_ended_what_it_measured_and_where_its_files_are() -> None:
    study = opened(*ASHA)
    simulate(study, curve, workers=1, keep=True)
    study.release()
    trials = [json.loads(said("show", "s", "--trial", str(number), "--json")) for number in range(6)]
    pruned = next(trial for trial in trials if trial["status"] == "pruned")
    assert pruned["why"].startswith("the scheduler stopped it after ")
    assert pruned["why"].endswith(" steps")
    complete = next(trial for trial in trials if trial["status"] == "complete")
    assert complete["why"] is None
    assert (complete["settings"]["model_name_or_path"], complete["children"]) == ("org/model", [])
    assert complete["folder"] == str(study.folder(complete["number"]).path)
    assert [told["step"] for told in complete["evaluations"]] == [1, 2, 3, 4]
    lines = said("show", "s", "--trial", str(complete["number"])).splitlines()
    assert lines[0] == f"Trial {complete['number']} of study 's': complete"
    assert f"  rho   {complete['sampled']['rho']}" in lines
    assert [line.split()[0] for line in lines if line.rstrip().endswith("kept")] == ["3/4"]
    assert f"Folder      {complete['folder']}" in lines


def test_a_trial_that_is_interrupted_or_failed_says_so() -> None:
    study = opened()
    next_trial(study)
    assert next_trial(study) == 1
    study.fail(1, "loss is nan at step 3", by_settings=True)
    study.release()
    assert "Why: its search ended before it did; --resume goes on with it" in said("show", "s", "--trial", "0")
    assert "Why: loss is nan at step 3" in said("show", "s", "--trial", "1")


# Those that wait


def test_a_trial_that_waits_is_listed_and_can_be_dropped() -> None:
    study = opened()
    next_trial(study)
    said("enqueue", "s", "rank=16", "rho=0.05")
    said("enqueue", "s", "rank=4")
    assert [line.split()[:2] for line in said("show", "s").splitlines() if " queued" in line] == [
        *(["Study", "'s':"], ["1", "queued"], ["2", "queued"])
    ]
    waiting = json.loads(said("show", "s", "--trial", "1", "--json"))
    assert (waiting["status"], waiting["sampled"]) == ("queued", {"rank": 16, "rho": 0.05})
    assert "Settings that were asked for:" in said("show", "s", "--trial", "1").splitlines()
    assert typed("export", "s", "--trial", "1", "--output", "x").stderr == (
        "Error: study 's': trial 1 is queued, and has not begun\n"
    )
    dropped = "Study 's': trial 1 is queued no more; it will have settings that are proposed.\n"
    assert said("stop", "s", "--trial", "1") == dropped
    assert [trial["number"] for trial in json.loads(said("show", "s", "--json"))["trials"]] == [0, 2]
    assert [next_trial(study), next_trial(study)] == [1, 2]
    assert study.record(1).sampled["rho"] != 0.05
    assert study.record(2).sampled["rank"] == 4
    assert json.loads(said("stop", "s", "--trial", "2", "--json"))["dropped"] is False
    study.release()


def test_a_point_of_the_space_that_was_dropped_is_not_asked_for_again_by_a_resume() -> None:
    points = "study.points_to_evaluate=[{rank: 8, rho: 0.02}, {rank: 4, rho: 0.03}]"
    study = opened(points)
    assert next_trial(study) == 0
    study.release()
    assert json.loads(said("stop", "s", "--trial", "1", "--json"))["dropped"] is True
    study = opened(points)
    assert study.queued() == []
    assert [next_trial(study) for _ in range(2)] == [0, 1]
    assert study.record(1).sampled["rho"] != 0.03
    study.release()


# Tables


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_name_and_no_number_is_broken_within_a_word(width: int) -> None:
    sampled = {"per_device_train_batch_size": 16, "auxiliary_learning_rate": 0.00123, "rank": 8}
    table = TrialTable("trial", "status", "eval_exact_match", "step")
    table.add("0", "stopped early", "0.715", "138/180", sampled=sampled)
    console = Console(file=StringIO(), width=width)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    assert {"138/180", "0.715"} <= set(words)
    for name, value in {"per_device_train_batch_size": "16", "auxiliary_learning_rate": "0.00123", "rank": "8"}.items():
        as_column = value in words and (name in words or set(_broken(name).splitlines()) <= set(words))
        assert as_column or f"{name}={value}" in words


def test_names_are_whole_where_there_is_room() -> None:
    table = TrialTable("trial", "eval_exact_match")
    table.add("0", "0.5", sampled={"auxiliary_learning_rate": 0.1})
    console = Console(file=StringIO(), width=80)
    console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.split()[:3] == ["trial", "eval_exact_match", "auxiliary_learning_rate"]
