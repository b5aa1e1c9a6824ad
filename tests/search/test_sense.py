"""What a space may say and nobody means: one line each, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bilora_ray.cli.main import main
from bilora_ray.search.preflight import preflight
from bilora_ray.search.space.shipped import space_file
from bilora_ray.search.space_file import load_space

DATA = "builtin:quickstart"


def validated(*settings: str) -> Result:
    return CliRunner().invoke(main, ["validate", "quickstart", *(f"--set={setting}" for setting in settings)])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["study.target=5"], "study.target: 5, and eval_exact_match is from 0 to 1"),
        (["study.target=-0.1"], "study.target: -0.1, and eval_exact_match is from 0 to 1"),
        (["study.points_to_evaluate=[{}]"], "study.points_to_evaluate[0]: names no setting"),
        (
            [f"test_data={DATA}/train.jsonl", "study.finalists=2"],
            "trial.test_data: is train_data, and a test is of rows that no trial saw",
        ),
        (
            [f"test_data={DATA}/validation.jsonl", "study.finalists=2"],
            "trial.test_data: is validation_data, and a test is of rows that no trial saw",
        ),
        (
            [f"retention_data={DATA}/test.jsonl", "study.finalists=2"],
            "trial.retention_data: is read where test rows are scored; give trial.test_data",
        ),
    ],
)
def test_what_can_never_be_right_is_refused(settings: list[str], line: str) -> None:
    done = validated(*settings)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"Error: {space_file('quickstart')}: {line}\n"


def test_rows_are_the_same_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = '{"prompt": "a", "completion": "b"}\n'
    for name in ("train.jsonl", "other.jsonl"):
        (tmp_path / name).write_text(row * 9)
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    (tmp_path / "linked").symlink_to(".")
    given = ["train_data=train.jsonl", "validation_data=null", "study.finalists=2", "answer_pattern=null"]
    for name in ("link.jsonl", "linked/train.jsonl", f"../{tmp_path.name}/./train.jsonl"):
        done = validated(*given, f"test_data={name}")
        assert "trial.test_data: is train_data, and a test is of rows that no trial saw" in done.stderr
    assert validated(*given, "test_data=linked/other.jsonl").exit_code == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["study.finalists=13"], "finalists: 13 are more than the 12 trials (num_trials): all are chosen"),
        (
            ["study.scheduler=pbt", "study.population=16"],
            "population: 16 are more than the 12 trials (num_trials), so that weak ones lend their checkpoints too",
        ),
        (
            ["study.rung_unit=epochs", "study.grace_period=12"],
            "grace_period: 12 epochs, and the longest trial has 12, so that none is stopped early",
        ),
        (
            ["max_steps=45"],
            "grace_period: 45 steps, and the longest trial has 45, so that none is stopped early",
        ),
    ],
)
def test_what_does_nothing_is_noted(settings: list[str], line: str) -> None:
    done = validated(*settings)
    assert done.exit_code == 0, done.output
    assert f"Note: {line}" in done.output.splitlines()


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["study.target=0.9"],
        ["study.target=1"],
        ["metric=eval_loss", "study.target=5"],
        ["study.finalists=12", f"test_data={DATA}/test.jsonl"],
        ["study.scheduler=pbt", "study.population=12"],
        ["study.rung_unit=epochs", "study.grace_period=11"],
        ["max_steps=46"],
    ],
)
def test_what_may_be_meant_is_taken_without_a_word(settings: list[str]) -> None:
    done = validated(*settings)
    assert done.exit_code == 0, done.output
    assert "Note" not in done.output


@pytest.mark.parametrize(
    ("grace_period", "settings", "longest"),
    [
        (180, [], 180),
        (179, [], None),
        (240 * 12, ["study.rung_unit=rows"], 240 * 12),
        (240 * 12 - 1, ["study.rung_unit=rows"], None),
        # A step of the larger batch is as much training as two of the smaller.
        (96, ["per_device_train_batch_size={choice: [16, 32]}"], 96),
        (100_000, ["study.rung_unit=tokens"], None),
    ],
)
def test_a_grace_period_is_held_to_the_rows_once_they_are_read(
    grace_period: int, settings: list[str], longest: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    told = preflight(load_space(space_file("quickstart"), [f"study.grace_period={grace_period}", *settings])).notes
    found = [line for line in told if line.startswith("grace_period")]
    assert [f"longest trial has {longest}," in line for line in found] == [True] * (longest is not None)
