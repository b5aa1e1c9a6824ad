"""A run is taken up again: listed, trained anew with its settings, merged, and measured as a merged model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_trials import Tiny

from bilora_ray.cli.main import main
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study


def bilora_ray(*arguments: str) -> str:
    """What a command prints on stdout."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def best_of(study: str) -> dict[str, Any]:
    """The best trial of a study, as JSON."""
    return json.loads(bilora_ray("show", study, "--json"))["best"]


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {
        "rank": 3,
        "max_steps": 4,
        "learning_rate": 1e-5,
        "prompt_template": "\U0001f642 {prompt}",
    }
    settings = tiny.config("causal-lm", **changes).model_dump(exclude_unset=True)
    sets = (f"--set={key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())
    bilora_ray("train", "--name=once", "--set=study.project=mine", *sets)


def test_a_file_that_has_changed_since_is_told(trained: None, tiny: Tiny, tmp_path: Path) -> None:
    data = Path(tiny.config("causal-lm").train_data)
    (tmp_path / "rows.jsonl").write_text(data.read_text())
    first = ("train", "--study=once", "--set=train_data=rows.jsonl")
    # Another file is none that has changed.
    assert "has changed" not in CliRunner().invoke(main, [*first, "--name=two"]).stderr
    (tmp_path / "rows.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    said = " ".join(CliRunner().invoke(main, ["train", "--study=two", "--name=three"]).stderr.split())
    assert f"Note: train_data: {tmp_path / 'rows.jsonl'} has changed since the study began" in said


def test_a_run_is_listed_trained_anew_and_measured_merged(trained: None, tiny: Tiny) -> None:
    first = best_of("once")
    listed: dict[str, Any] = {"num_trials": 1, "ended": 1, "metric": "eval_loss"}
    listed |= {"best": first["eval_loss"], "is_gone": False}
    assert json.loads(bilora_ray("show", "--json")) == [{"study": "once", **listed}]
    assert re.search(r"^ +rank +3$", bilora_ray("show", "once"), re.M)

    bilora_ray("train", "--study=once", "--name=same")
    assert best_of("same")["eval_loss"] == first["eval_loss"]
    assert load_study(Layout(Path.cwd() / "runs"), "same").space.study.project == "mine"
    bilora_ray("train", "--study=once", "--trial=0", "--name=longer", "--set=max_steps=6")
    assert best_of("longer")["evaluations"][-1]["max_steps"] == 6
    assert [row.split()[0] for row in bilora_ray("show").splitlines()[3:6]] == ["once", "same", "longer"]

    bilora_ray("export", "once", "--output=merged", "--merge")
    # What is exported names no path of this machine.
    rows = f"--data={tiny.config('causal-lm').validation_data}"
    merged = json.loads(bilora_ray("evaluate", "merged", rows, "--json"))
    assert merged["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-4)
    shown = json.loads(bilora_ray("evaluate", "merged", rows, "--examples=2", "--json"))["examples"]
    assert [list(example) for example in shown] == [["input", "prediction", "reference"]] * 2
    assert "reference   '" in bilora_ray("evaluate", "merged", rows, "--examples=1")
    here = f"--set=model_name_or_path={tiny.model('causal-lm')}"
    base = json.loads(bilora_ray("evaluate", "merged", rows, "--base-model", here, "--json"))
    assert base["eval_loss"] > merged["eval_loss"]
