"""What `evaluate` measures on, held-out rows or others that are named, and what it says beside the numbers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_trials import Tiny, run_fit

from bilora_ray.cli.main import main
from bilora_ray.config import Task
from bilora_ray.release.export import export_merged
from bilora_ray.training.folder import TrialFolder

# An adapter as far as it is read before anything is measured.
FILES = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}
SETTINGS = {"model_name_or_path": "/gone", "task": "causal-lm", "train_data": "/gone.jsonl", "seed": 0}
ELSEWHERE = "model_name_or_path: no such folder: /gone"
HELD_OUT = "would measure on rows that the training did not hold out; give --data"


def run(typed: str) -> Result:
    return CliRunner().invoke(main, shlex.split(typed))


def ran(typed: str) -> str:
    result = run(typed)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def error(typed: str) -> str:
    result = run(typed)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.removeprefix("Error: ").removesuffix("\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    return tmp_path


def adapter(here: Path, **settings: Any) -> None:
    """Make the folder `adapter`."""
    (here / "adapter").mkdir()
    recipe = json.dumps({"settings": {**SETTINGS, **settings}})
    for name, text in {**FILES, "bilora_ray.json": recipe}.items():
        (here / "adapter" / name).write_text(text)


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "split_seed=1",
        "validation_fraction=0.5",
        "train_data=rows.jsonl",
        "train_split=test",
        "dataset_config_name=sst2",
        "column_names=[prompt, completion]",
    ],
)
def test_the_held_out_rows_are_those_of_the_training(change: str, here: Path) -> None:
    adapter(here)
    typed = f"evaluate adapter --set '{change}'"
    assert error(typed) == f"--set {change}: {HELD_OUT}"
    # Where rows are named nothing is held out; what is wrong then is that the model is gone.
    assert error(f"{typed} --data rows.jsonl") == ELSEWHERE
    assert error(f"{typed} --set validation_data=rows.jsonl --set train_data=rows.jsonl") == ELSEWHERE


@pytest.mark.parametrize("named", ["validation_data", "validation_split"])
def test_rows_that_were_named_are_not_taken_for_held_out_ones(named: str, here: Path) -> None:
    adapter(here, **{named: "/gone.jsonl"})
    assert error(f"evaluate adapter --set {named}=null") == f"--set {named}=null: {HELD_OUT}"


def test_the_seed_does_not_decide_what_a_split_seed_does(here: Path) -> None:
    adapter(here, split_seed=0, train_data=str(here / "rows.jsonl"))
    assert error("evaluate adapter --set seed=1") == ELSEWHERE


def test_a_trial_trained_anew_with_another_seed_is_measured_on_the_same_rows(tiny: Tiny, here: Path) -> None:
    settings = tiny.config("causal-lm", max_steps=2, max_train_samples=20).model_dump(exclude_unset=True)
    del settings["validation_data"]
    ran("train --name=one " + " ".join(f"--set={key}={value}" for key, value in settings.items()))
    ran("train --name=two --study=one --set=seed=1")
    ran("train --name=three --study=two --set=seed=2 --set=split_seed=1")
    recipes = {}
    for name in ("one", "two", "three"):
        best = json.loads(ran(f"show {name} --json"))["best"]
        ran(f"export {name} --output={name}")
        assert json.loads(ran(f"evaluate {name} --json"))["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
        recipes[name] = json.loads((here / name / "bilora_ray.json").read_text())["settings"]
    seeds = [(recipe["seed"], recipe["split_seed"]) for recipe in recipes.values()]
    assert seeds == [(0, None), (1, 0), (2, 1)]
    # As 0.1.0 wrote it.
    before = ran("evaluate one --json")
    recipe = {key: value for key, value in recipes["one"].items() if key != "split_seed"}
    (here / "one" / "bilora_ray.json").write_text(json.dumps({"settings": recipe}))
    assert ran("evaluate one --json") == before


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def adapter_of(tiny: Tiny, task: Task, folder: Path, **settings: Any) -> Path:
    """An adapter that was trained for a step."""
    run_fit(tiny.config(task, max_steps=1, **settings), folder)
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    return adapter


def test_a_base_model_whose_head_is_random_is_told(tiny: Tiny, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, "sequence-classification", tmp_path / "trial")
    base = tiny.model("sequence-classification")
    line = f"the head of base model {base} is random: its files hold no weights of classifier"
    shown = evaluate(adapter, "--base-model")
    assert f"Note: {line}\n" in shown.stderr
    assert "Note" not in shown.stdout
    assert json.loads(evaluate(adapter, "--base-model", "--json").stdout)["notes"] == [line]
    # An adapter has its head with it, and so has a merged model.
    export_merged(adapter, tmp_path / "merged", {})
    for trained in (adapter, tmp_path / "merged"):
        assert "Note" not in evaluate(trained).stderr
        assert "notes" not in json.loads(evaluate(trained, "--json").stdout)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_a_base_model_that_is_whole_is_measured_without_a_word(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    assert "Note" not in evaluate(adapter_of(tiny, task, tmp_path), "--base-model").stderr
