"""What a search and a study look like on a terminal and in a log."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from bilora_ray.cli.leaderboard import print_leaderboard
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.tune import _print_plan
from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.search.preflight import Checked
from bilora_ray.search.space_file import load_space
from bilora_ray.training.loading import Truncation
from bilora_ray.training.rehearsal import Rehearsal
from bilora_ray.training.tasks.base import Dataset

METRIC = "eval_exact_match"
OBJECTIVE = Objective(METRIC, greater_is_better=True)
SAMPLED = {"rank": 16, "auxiliary_rank": 8, "rho": 0.0123456, "learning_rate": 0.00123}
MORE = {"method": "bilora", **SAMPLED, "auxiliary_learning_rate": 0.01}


def record(number: int, status: Status, value: float | None = None, **more: Any) -> TrialRecord:
    history = () if value is None else ({"step": 46.0, "max_steps": 180.0, METRIC: value / 2},)
    settings = {"max_length": 128, "truncation": "both", "predict_with_generate": False, **SAMPLED}
    return TrialRecord(number, status, settings, SAMPLED, history=history, value=value, **more)


def leaderboard(records: list[TrialRecord], width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    print_leaderboard(console, records, [OBJECTIVE])
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_four_settings_have_columns_of_their_own_on_80_characters() -> None:
    lines = leaderboard([record(4, Status.PRUNED, 0.61)], width=80)
    assert lines[1:] == [
        "                        eval_",
        "                       exact_                auxiliary_          learning_",
        " trial  status          match    step  rank        rank     rho       rate",
        " " + "─" * 73,
        "     4  stopped early    0.61  46/180    16           8  0.0123    0.00123",
        "",
    ]


def test_more_settings_than_have_room_are_whole_in_one_column() -> None:
    many = TrialRecord(0, Status.COMPLETE, MORE, MORE, value=0.5)
    narrow = " ".join(" ".join(leaderboard([many], width=80)).split())
    assert "method=bilora rank=16 auxiliary_rank=8 rho=0.0123 learning_rate=0.00123" in narrow
    assert all(len(line) <= 80 for line in leaderboard([many], width=80))
    assert "method=" not in " ".join(leaderboard([many], width=120))


def test_a_trial_that_failed_late_stands_where_its_adapter_does_and_is_never_the_best() -> None:
    records = [
        record(0, Status.FAILED, error="x"),
        record(1, Status.FAILED, 0.9, error="loss is nan at step 3"),
        record(2, Status.PRUNED, 0.1),
        record(3, Status.COMPLETE, 0.0),
        record(4, Status.PRUNED, 0.95),
    ]
    lines = leaderboard(records, width=80)
    rows = [line.split() for line in lines]
    assert [row[:3] for row in rows if row and row[0].isdigit()] == [
        ["3", "complete", "0"],
        ["4", "stopped", "early"],
        ["1", "failed", "0.9"],
        ["2", "stopped", "early"],
        ["0", "failed", "16"],
    ]
    assert "trial 1 failed: loss is nan at step 3" in lines
    best = OBJECTIVE.best_of(records)
    assert best is not None
    assert best.number == 3


def test_a_trial_without_a_setting_has_an_empty_cell() -> None:
    plain = TrialRecord(1, Status.COMPLETE, {}, {"rank": 4}, value=0.4)
    lines = leaderboard([record(0, Status.COMPLETE, 0.5), plain], width=100)
    assert lines[-2].split() == ["1", "complete", "0.4", "4"]


def test_sharpness_has_a_column_where_it_was_measured() -> None:
    sharp = TrialRecord(0, Status.COMPLETE, {}, {"rank": 4}, value=0.5, values={METRIC: 0.5, "sharpness": 0.0321})
    lines = leaderboard([sharp, record(1, Status.COMPLETE, 0.4)], width=120)
    assert "sharpness" in " ".join(lines)
    assert lines[-3].split() == ["0", "complete", "0.5", "0.0321", "4"]
    assert "sharpness" not in " ".join(leaderboard([record(1, Status.COMPLETE, 0.4)], width=120))


@pytest.mark.parametrize("width", [40, 120])
def test_a_setting_is_text_whatever_it_looks_like(width: int) -> None:
    template = {"prompt_template": "[INST] {q} [/INST]"}
    lines = leaderboard([TrialRecord(0, Status.COMPLETE, template, template, value=0.5)], width)
    assert "[INST]{q}[/INST]" in "".join("".join(lines).split())


def test_complete_trials_come_first_and_the_others_by_the_value_of_their_adapter() -> None:
    records = [
        record(0, Status.FAILED, error="loss is nan"),
        record(1, Status.PRUNED, 0.7),
        record(2, Status.COMPLETE, 0.4),
        record(3, Status.PRUNED, 0.8),
        record(4, Status.COMPLETE, 0.5),
    ]
    lines = [line.split()[0] for line in leaderboard(records, width=80)[5:] if line]
    assert lines == ["4", "2", "3", "1", "0", "trial"]
    best = OBJECTIVE.best_of(records)
    assert best is not None
    assert best.number == 4
    assert OBJECTIVE.best_of(records[:2]) is None


def test_where_there_is_no_terminal_each_ended_trial_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with SearchProgress(3, OBJECTIVE) as progress:
        progress.start([record(0, Status.COMPLETE, 0.5)])
        progress.trial_started(record(1, Status.RUNNING))
        progress.trial_reported(record(1, Status.RUNNING, 0.25), {"step": 1.0, "max_steps": 2.0, METRIC: 0.25})
        progress.trial_ended(record(1, Status.PRUNED, 0.25))
        progress.trial_ended(record(2, Status.FAILED, error="loss is nan at step 3"))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "1 of 3 trials done; running\n"
        "2 of 3 trials done: trial 1 stopped early, eval_exact_match 0.25\n"
        "3 of 3 trials done: trial 2 failed: loss is nan at step 3\n"
    )


def test_a_dry_run_lists_the_labels_before_the_notes(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("model_name_or_path=builtin:quickstart/model", "train_data=builtin:quickstart/train.jsonl")
    space = load_space(None, [*settings, "task=causal-lm", "study.name=s", "rho={low: 0.01, high: 0.2}"])
    rehearsal = Rehearsal({"train": Truncation(3, 1, 0)}, "read", "learned", ("max_length: is low",))
    config, rows = space.first_config(), Dataset([], [], None, {})
    _print_plan(space, rehearsal, Checked({}, ("train labels: 'a' 2",), ("rho: is odd",), config, rows))
    assert capsys.readouterr().out.splitlines()[-7:] == [
        "train rows: 3; 1 are cut to max_length 512",
        "of a training row the model reads 'read'",
        "and learns 'learned'",
        "train labels: 'a' 2",
        "Note: rho: is odd",
        "Note: max_length: is low",
        "Nothing was started.",
    ]


def test_notes_are_told_once_before_the_first_trial(capsys: pytest.CaptureFixture[str]) -> None:
    with SearchProgress(3, OBJECTIVE, notes=["rho: is odd"], labels=["train labels: 'a' 2"]) as progress:
        progress.start([])
        assert capsys.readouterr().err == ""
        progress.trial_started(record(0, Status.RUNNING))
        progress.trial_started(record(1, Status.RUNNING))
    assert capsys.readouterr().err == "train labels: 'a' 2\nNote: rho: is odd\n0 of 3 trials done; running\n"


def test_a_log_says_now_and_then_how_a_trial_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = SearchProgress(1, OBJECTIVE)
    running, metrics = record(0, Status.RUNNING, 0.25), {"step": 1.0, "max_steps": 2.0, METRIC: 0.25}
    progress.trial_reported(running, metrics)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("bilora_ray.cli.progress.REPORT_EVERY_S", 0.0)
    progress.trial_reported(running, metrics)
    assert capsys.readouterr().err == "trial 0 at step 1/2, eval_exact_match 0.25\n"


def test_of_equal_trials_the_one_with_the_lowest_loss_is_the_best() -> None:
    losses = {0: 0.7, 1: 0.5, 2: 0.6}
    records = [record(number, Status.COMPLETE, 0.5, loss=loss) for number, loss in losses.items()]
    best = OBJECTIVE.best_of(records)
    assert best is not None
    assert best.number == 1
    rows = [line.split()[0] for line in leaderboard(records, width=80)[5:] if line]
    assert rows == ["1", "2", "0"]


def told_of_rows(capsys: pytest.CaptureFixture[str], **counts: float) -> list[str]:
    """What is said of so many rows as two trials report."""
    progress = SearchProgress(3, OBJECTIVE)
    for number in range(2):
        metrics = {"step": 1.0, "max_steps": 2.0, METRIC: 0.25, **counts}
        progress.trial_reported(record(number, Status.RUNNING, 0.25), metrics)
    return capsys.readouterr().err.splitlines()


def test_rows_that_are_cut_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert told_of_rows(capsys, rows=700.0, rows_cut=9.0, rows_prompt_cut=7.0, rows_completion_cut=4.0) == [
        "of 700 rows 9 are cut to max_length 128 (part of the input: 7, end of the completion: 4)"
    ]
    assert told_of_rows(capsys, rows=700.0, rows_cut=0.0) == []
    assert told_of_rows(capsys, rows_cut=9.0) == []  # a trial that an earlier version began
    assert told_of_rows(capsys, rows=700.0, rows_dropped=3.0) == [
        "of 700 rows 0 are cut to max_length 128, 3 have nothing to predict and are left out"
    ]


def test_a_trial_that_is_not_compiled_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert told_of_rows(capsys, compiled=1.0) == []
    assert told_of_rows(capsys, compiled=0.0) == [
        "Note: trial 0: torch_compile: not all blocks are compiled, or none; a dry run says what this machine lacks"
    ]


def test_rows_that_lose_what_they_are_about_are_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert told_of_rows(capsys, rows=18.0, rows_cut=18.0, rows_prompt_gone=18.0, rows_completion_cut=17.0) == [
        "of 18 rows 18 are cut to max_length 128 (whole prompt: 18, end of the completion: 17)",
        "Note: max_length: 18 of 18 rows (100%) lose their whole prompt; raise it, or change truncation (both)",
        "Note: max_length: 17 of 18 rows (94%) lose the end of their completion, so that they teach no end of "
        "sequence; raise it, or change truncation (both)",
    ]
