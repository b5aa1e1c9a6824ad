"""What `show` says of a study's settings: which mattered, by what, and how sure that is; or why it does not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_trials import next_trial

from bilora_ray.cli.main import main
from bilora_ray.records import Status
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.importances import METHOD
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study

SPACE = [
    "study.name=s",
    "study.scheduler=none",
    "trial.model_name_or_path=org/model",
    "trial.task=causal-lm",
    "trial.train_data=org/data",
    "trial.rho={low: 0.01, high: 0.2, log: true}",
    "trial.rank={choice: [4, 8, 16]}",
]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["show", "s", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def searched(trials: int) -> None:
    """A study in `runs` whose trials' losses are their `rho`."""
    study = open_study(load_space(None, [*SPACE, f"study.num_trials={trials}"]), Layout(Path("runs")), {})
    while (number := next_trial(study)) is not None:
        rho = float(study.config(number).rho)
        for step in (5, 10):
            study.report(number, {"step": step, "max_steps": 10, "eval_loss": rho})
    study.release()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


def test_what_mattered_is_shown_with_its_interval_and_its_method() -> None:
    searched(20)
    lines = shown().splitlines()
    start = lines.index("What mattered, by eval_loss after 80 training rows, of its variance among 20 trials:")
    detail = json.loads(shown("--json"))
    share, (low, high) = detail["importances"]["rho"], detail["importances_detail"]["intervals"]["rho"]
    assert 0.9 < low <= share <= high <= 1
    assert lines[start + 1 : start + 4] == [
        f"  rho   {share:.0%} ({low:.0%} to {high:.0%})",
        "  rank  cannot be told",
        f"By {METHOD}.",
    ]
    assert detail["importances"].keys() == {"rho"}
    assert (detail["importances_detail"]["rows"], detail["importances_detail"]["num_trials"]) == (80, 20)


def test_where_nothing_is_known_it_says_why() -> None:
    searched(3)
    why = "known from 12 comparable trials on; there are 3"
    assert f"What mattered, by eval_loss after 80 training rows: {why}" in shown().splitlines()
    found = json.loads(shown("--json"))
    assert found["importances"] == {}
    assert found["importances_detail"] == {"rows": 80, "num_trials": 3, "intervals": {}, "unknown": why}


def test_what_ran_out_of_memory_and_went_on_smaller_is_said() -> None:
    study = open_study(load_space(None, [*SPACE, "study.num_trials=3"]), Layout(Path("runs")), {})
    for limits in ({}, {"training_limit": 512}, {"training_limit": 700, "generation_limit": 4}):
        number = next_trial(study)
        assert number is not None
        report = {"step": 10, "max_steps": 10, "eval_loss": 1.0, **limits}
        study.report(number, report)
        (study.folder(number).checkpoint_at(10)).mkdir(parents=True)
        (study.folder(number).checkpoint_at(10) / "state.json").write_text(json.dumps({"history": [report]}))
    study.release()
    lines = shown().splitlines()
    assert "In 2 trials: training passes of at most 512 positions: larger ones ran out of memory." in lines
    assert "In 2 trials: generation of at most 4 texts at once: more ran out of memory." in lines


def test_nothing_is_said_of_memory_where_all_had_room() -> None:
    searched(2)
    assert "memory" not in shown()


def test_how_far_trials_came_that_were_stopped_is_said() -> None:
    study_settings = ["study.num_trials=4", "study.scheduler=asha", "study.grace_period=1000", "study.rung_unit=tokens"]
    study = open_study(load_space(None, [*SPACE, *study_settings]), Layout(Path("runs")), {})
    for loss, tokens in ((1.0, 500), (2.0, 500), (3.0, 625), (4.0, 1200)):
        number, step = next_trial(study), 0
        assert number is not None
        status = Status.RUNNING
        while status is Status.RUNNING:
            step += 1
            metrics = {"step": step, "max_steps": 8, "eval_loss": loss, "num_input_tokens_seen": tokens * step}
            status = study.report(number, metrics)
    study.release()
    assert "Stopped early: 3, after 1,000 tokens at the earliest, 1,250 tokens at the latest" in shown().splitlines()
    trials = json.loads(shown("--json"))["trials"]
    after = [None, {"tokens": 1000}, {"tokens": 1250}, {"tokens": 1200}]
    assert [trial["stopped_after"] for trial in trials] == after
