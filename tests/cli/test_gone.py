"""A study of which a part was removed by hand: each verb says so, and makes nothing anew in its place."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from tiny_trials import next_trial

from bilora_ray.cli.main import COMMANDS, main
from bilora_ray.errors import UserError
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import check_study, load_study, open_study

TRIAL = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "rho={low: 0.01, high: 0.2}")
SPACE = load_space(None, [*TRIAL, "study.name=s", "study.scheduler=none", "study.num_trials=2"])
# What a verb wants beside the name of a study.
MORE = {
    "enqueue": ["rho=0.1"],
    "clone": ["new"],
    "export": ["--output=out"],
    "delete": ["--yes"],
    "register": ["--name=n"],
}


def with_a_study() -> list[str]:
    """The verbs that are given the name of a study."""
    found = []
    for verb in COMMANDS:
        command: click.Command = importlib.import_module(f"bilora_ray.cli.{verb}").command
        if any(isinstance(one, click.Argument) and one.name == "study" for one in command.params):
            found.append(verb)
    return found


TYPED = [[verb, "s", *MORE.get(verb, [])] for verb in with_a_study()]
TYPED += [
    ["stop", "s", "--trial=0"],
    ["show", "s", "--json"],
    ["train", "--study=s"],
    ["train", "--study=s", "--trial=0"],
]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Where study `s` has one trial, which is done."""
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "BILORA_RAY_STORAGE_PATH", "BILORA_RAY_STUDY_DATABASE"):
        monkeypatch.delenv(variable, raising=False)
    made = Layout(tmp_path / "runs")
    study = open_study(SPACE, made, {})
    assert next_trial(study) == 0
    study.report(0, {"step": 3, "max_steps": 3, "eval_loss": 1.0})
    study.release()
    return made


def typed(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(layout: Layout, *words: str) -> str:
    """The line with which a verb refuses; it writes nothing."""
    before = files(layout.storage_path.parent)
    result = typed(*words)
    after = files(layout.storage_path.parent)
    assert (result.exit_code, result.stdout) == (2, ""), result.stdout
    assert {name: after[name] for name in after if "studies.db" not in name} == {
        name: before[name] for name in before if "studies.db" not in name
    }
    assert ("runs/studies.db" in after) == ("runs/studies.db" in before)
    assert not (layout.storage_path.parent / "out").exists()
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("left", ["nothing", "its locks"])
@pytest.mark.parametrize("words", [words for words in TYPED if words[0] != "delete"], ids=" ".join)
def test_a_folder_that_is_gone_is_said_to_be(words: list[str], left: str, layout: Layout) -> None:
    shutil.rmtree(layout.study("s") if left == "nothing" else layout.trials("s"))
    line = f"Error: study 's': its folder is gone; it was {layout.study('s')}: put it back, or remove the rest with "
    assert refusal(layout, *words) == f"{line}`bilora-ray delete s`"
    assert not layout.trials("s").exists()


def test_a_list_of_studies_marks_one_whose_folder_is_gone(layout: Layout) -> None:
    open_study(load_space(None, [*TRIAL, "study.name=whole", "study.scheduler=none"]), layout, {}).release()
    shutil.rmtree(layout.study("s"))
    told = {words[0]: " ".join(words) for words in map(str.split, typed("show").stdout.splitlines()) if words}
    assert told["s"].startswith("s (its folder is gone) 1 of 2 eval_loss")
    assert told["whole"].startswith("whole 0 of ")
    assert {one["study"]: one["is_gone"] for one in json.loads(typed("show", "--json").stdout)} == {
        "s": True,
        "whole": False,
    }


@pytest.mark.parametrize("resume", [True, False])
def test_a_search_begins_none_anew_in_the_place_of_a_folder_that_is_gone(resume: bool, layout: Layout) -> None:
    shutil.rmtree(layout.study("s"))
    with pytest.raises(UserError, match="its folder is gone"):
        check_study(SPACE, layout, resume, {})
    assert not layout.study("s").exists()


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_a_folder_that_the_database_has_lost_is_said_to_be(words: list[str], layout: Layout) -> None:
    layout.database_file.unlink()
    line = f"Error: {layout.trials('s')}: holds trials that the study database does not know; move it away"
    assert refusal(layout, *words) == line


@pytest.mark.parametrize("resume", [True, False])
def test_a_search_begins_none_anew_in_a_folder_that_the_database_has_lost(resume: bool, layout: Layout) -> None:
    layout.database_file.unlink()
    with pytest.raises(UserError, match="does not know; move it away"):
        check_study(SPACE, layout, resume, {})
    assert not layout.database_file.exists()


def test_what_is_left_of_a_study_can_be_deleted(layout: Layout) -> None:
    shutil.rmtree(layout.study("s"))
    refused = CliRunner().invoke(main, ["delete", "s"], input="n\n")
    assert (refused.exit_code, layout.study("s").exists()) == (1, False)
    assert load_study(layout, "s", even_if_gone=True).records()
    result = typed("delete", "s", "--yes", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"study": "s", "freed_bytes": 0, "runs": 0}
    assert not layout.study("s").exists()
    open_study(SPACE, layout, {}).release()  # the name is free again
