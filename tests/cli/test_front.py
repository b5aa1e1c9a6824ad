"""Several objectives on the command line: the front in the table, in JSON, and which adapter is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_trials import next_trial

from bilora_ray.cli.main import main
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study

SPACE = [
    "study.name=s",
    "study.scheduler=none",
    "study.num_trials=4",
    "trial.model_name_or_path=org/model",
    "trial.task=causal-lm",
    "trial.train_data=org/data",
    "trial.rho={low: 0.01, high: 0.2}",
]
TWO = "study.objectives=[{metric: eval_loss}, {metric: train_runtime}]"
# The loss, the seconds and the size of each trial; the third breaks the limit, the fourth is worse than the first.
TRIALS = [(1.0, 30.0, 1.0), (2.0, 10.0, 1.0), (0.5, 5.0, 9.0), (1.5, 40.0, 1.0)]


def invoked(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments])


@pytest.fixture(autouse=True)
def _searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    study = open_study(load_space(None, [*SPACE, TWO, "study.max_adapter_mb=2"]), Layout(Path("runs").absolute()), {})
    for loss, seconds, size in TRIALS:
        number = next_trial(study)
        assert number is not None
        evaluation = {"step": 10, "max_steps": 10, "eval_loss": loss, "train_runtime": seconds, "adapter_mb": size}
        study.report(number, evaluation)
    study.release()


def test_show_marks_the_front_and_says_which_trial_is_the_best_by_what() -> None:
    result = invoked("show", "s")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    table = [line[:6] for line in lines if line[:1] in (["0"], ["1"], ["2"], ["3"])]
    assert [row[0] for row in table] == ["0", "1", "3", "2"]
    assert ["yes" in row for row in table] == [True, True, False, False]
    assert "trial 2 is out: max_adapter_mb: adapter_mb is 9, 2 is allowed" in result.stdout.splitlines()
    assert "Best by eval_loss: trial 0, eval_loss 1, train_runtime 30" in result.stdout
    assert "Pareto front of the complete trials: trials 0, 1; `export` takes the first" in result.stdout


def test_json_has_all_values_and_the_front() -> None:
    found = json.loads(invoked("show", "s", "--json").stdout)
    assert found["pareto_front"] == [0, 1]
    assert found["objectives"][1] == {"metric": "train_runtime", "greater_is_better": False}
    assert [trial["train_runtime"] for trial in found["trials"]] == [30.0, 10.0, 5.0, 40.0]
    assert [trial["status"] for trial in found["trials"]] == ["complete", "complete", "pruned", "complete"]
    assert "broken" in found["trials"][2]
    assert found["best"]["number"] == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prefer", "train_runtim"], "'train_runtim' is no objective of it; did you mean 'train_runtime'?"),
        (["--prefer", "eval_loss", "--trial", "1"], "--trial names the trial already"),
        (["--prefer", "train_runtime"], "the adapter of trial 1 is gone"),
        ([], "the adapter of trial 0 is gone"),
    ],
)
def test_export_takes_the_trial_that_is_preferred(arguments: list[str], problem: str) -> None:
    result = invoked("export", "s", "--output", "out", *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert not Path("out").exists()
