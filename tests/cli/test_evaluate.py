"""What `evaluate` measures on, held-out rows or others that are named, and what it says beside the numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_trials import Tiny, run_fit

from bilora_ray.cli.main import main
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.release.export import export_merged
from bilora_ray.runners.scoring import score
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
    # What is exported names no path of this machine.
    measure = f"evaluate {{}} --json --set train_data={settings['train_data']}"
    measure += f" --set model_name_or_path={settings['model_name_or_path']}"
    recipes = {}
    for name in ("one", "two", "three"):
        best = json.loads(ran(f"show {name} --json"))["best"]
        ran(f"export {name} --output={name}")
        assert json.loads(ran(measure.format(name)))["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
        recipes[name] = json.loads((here / name / "bilora_ray.json").read_text())["settings"]
    seeds = [(recipe["seed"], recipe["split_seed"]) for recipe in recipes.values()]
    assert seeds == [(0, None), (1, 0), (2, 1)]
    # As 0.1.0 wrote it.
    before = ran(measure.format("one"))
    recipe = {key: value for key, value in recipes["one"].items() if key != "split_seed"}
    known = json.loads((here / "one" / "bilora_ray.json").read_text())["digests"]
    (here / "one" / "bilora_ray.json").write_text(json.dumps({"settings": recipe, "digests": known}))
    assert ran(measure.format("one")) == before


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def adapter_of(tiny: Tiny, task: Task, folder: Path, **settings: Any) -> Path:
    """An adapter that was trained for a step."""
    run_fit(tiny.config(task, **{"max_steps": 1, **settings}), folder)
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    return adapter


def test_a_base_model_whose_head_is_random_is_told(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.folder)
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


# What has changed since the training


def trained_on_a_file(tiny: Tiny, here: Path, **settings: Any) -> Path:
    """An adapter whose validation rows were held out of `here`'s own training file; and its base, in `here` too."""
    (here / "own.jsonl").write_bytes(Path(str(tiny.config("causal-lm").train_data)).read_bytes())
    shutil.copytree(tiny.model("causal-lm"), here / "base")
    own = {"train_data": str(here / "own.jsonl"), "model_name_or_path": str(here / "base"), "validation_data": None}
    return adapter_of(tiny, "causal-lm", here / "trial", **own | settings)


def append_row(file: Path) -> None:
    with file.open("a") as opened:
        opened.write('{"prompt": "say red 1 times:", "completion": "red"}\n')


def test_rows_of_a_file_that_has_grown_are_not_called_held_out(tiny: Tiny, here: Path) -> None:
    adapter = trained_on_a_file(tiny, here)
    assert f"{here / 'own.jsonl'}, held out of training" in ran(f"evaluate {adapter}")
    append_row(here / "own.jsonl")
    line = "is not what it was in the training, so which of its rows were held out is not known; give --data"
    assert error(f"evaluate {adapter}") == f"train_data: {here / 'own.jsonl'} {line}"
    ran(f"evaluate {adapter} --data own.jsonl")


def test_the_rows_that_were_trained_on_are_known_wherever_they_are(tiny: Tiny, here: Path) -> None:
    adapter = trained_on_a_file(tiny, here)
    shutil.copy(here / "own.jsonl", here / "test.jsonl")
    line = "--data: test.jsonl is what was trained on, so that this says nothing of other rows"
    assert f"Note: {line}\n" in evaluate(adapter, "--data", "test.jsonl").stderr
    assert "Note" not in evaluate(adapter, "--data", "test.jsonl", "--base-model").stderr
    append_row(here / "test.jsonl")
    assert "Note" not in evaluate(adapter, "--data", "test.jsonl").stderr


def test_a_training_file_that_was_moved_is_known_by_its_content(tiny: Tiny, here: Path) -> None:
    adapter = trained_on_a_file(tiny, here)
    before = ran(f"evaluate {adapter} --json")
    (here / "own.jsonl").rename(here / "moved.jsonl")
    assert ran(f"evaluate {adapter} --set train_data=moved.jsonl --json") == before
    append_row(here / "moved.jsonl")
    line = "is not what it was in the training, so which of its rows were held out is not known; give --data"
    assert error(f"evaluate {adapter} --set train_data=moved.jsonl") == f"train_data: {here / 'moved.jsonl'} {line}"


def test_validation_rows_that_have_changed_are_told_unless_they_are_named(tiny: Tiny, here: Path) -> None:
    rows = here / "rows.jsonl"
    adapter = trained_on_a_file(tiny, here, validation_data=str(rows))
    append_row(rows)
    line = f"validation_data: {rows} is not what it was in the training, which was measured on other rows"
    assert json.loads(ran(f"evaluate {adapter} --json"))["notes"] == [line]
    for named in ("--data rows.jsonl", "--set validation_data=rows.jsonl"):
        assert "notes" not in json.loads(ran(f"evaluate {adapter} {named} --json"))


def test_an_adapter_is_not_measured_nor_merged_on_a_base_that_was_trained_since(tiny: Tiny, here: Path) -> None:
    adapter = trained_on_a_file(tiny, here)
    shutil.copytree(here / "base", here / "same")
    weights = load_file(here / "base" / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, here / "base" / "model.safetensors")
    told = f"model_name_or_path: {here / 'base'} has changed since the training: its digest was "
    assert error(f"evaluate {adapter}").startswith(told)
    assert error(f"evaluate {adapter} --data own.jsonl --examples 1").startswith(told)
    with pytest.raises(UserError, match=re.escape(told)):
        export_merged(adapter, here / "merged", {})
    assert not (here / "merged").exists()
    assert "notes" not in json.loads(ran(f"evaluate {adapter} --set model_name_or_path=same --json"))
    (here / "base").rename(here / "other")
    note = f"model_name_or_path: {here / 'other'} is another model than that of the training"
    assert json.loads(ran(f"evaluate {adapter} --set model_name_or_path=other --json"))["notes"] == [note]
    ran(f"evaluate {adapter} --base-model --set model_name_or_path=other")


def test_a_merged_model_knows_what_its_adapter_was_trained_on(tiny: Tiny, here: Path) -> None:
    adapter = trained_on_a_file(tiny, here)
    export_merged(adapter, here / "merged", {})
    ran("evaluate merged")
    append_row(here / "own.jsonl")
    assert error("evaluate merged").startswith("train_data: ./own.jsonl is not what it was in the training")


@pytest.mark.parametrize("method", ["full", pytest.param("bilora", marks=pytest.mark.slow)])
def test_a_whole_model_tells_what_it_has_forgotten(method: str, tiny: Tiny, here: Path) -> None:
    trained = trained_on_a_file(tiny, here, method=method, learning_rate=1e-2, max_steps=4)
    texts = "--set retention_data=texts.jsonl"
    (here / "texts.jsonl").write_text('{"text": "the sky is blue and the grass is green"}\n')
    if method == "full":
        before = score(
            str(trained),
            {
                **json.loads((trained / "bilora_ray.json").read_text())["settings"],
                "test_data": str(here / "rows.jsonl"),
                "retention_data": str(here / "texts.jsonl"),
            },
        )
        whole = trained
    else:
        before = json.loads(ran(f"evaluate {trained} --json {texts}"))
        export_merged(trained, here / "merged", {})
        whole = here / "merged"
    found = json.loads(ran(f"evaluate {whole} --json --examples 1 {texts}"))
    for key in ("forgetting", "retention_loss"):
        assert found[key] == pytest.approx(before[key], abs=1e-4)
    assert abs(found["forgetting"]) > 1e-3
    assert error(f"evaluate {whole} --base-model {texts}").startswith("--set retention_data: tells what a training")
    # The base is named where it has moved, and is the one that was trained on.
    (here / "base").rename(here / "moved")
    moved = f"evaluate {whole} --json {texts} --set model_name_or_path=moved"
    assert json.loads(ran(moved))["forgetting"] == found["forgetting"]
    assert "says nothing" in error(f"evaluate {whole} --set model_name_or_path=moved")
    weights = load_file(here / "moved" / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, here / "moved" / "model.safetensors")
    note = f"model_name_or_path: {here / 'moved'} is another model than that of the training"
    assert note in json.loads(ran(moved))["notes"]
    (here / "moved").rename(here / "base")
    weights = load_file(here / "base" / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, here / "base" / "model.safetensors")
    assert "has changed since" in error(f"evaluate {whole} {texts}")


def test_a_gpu_that_is_too_small_is_told_in_a_line(tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained_on_a_file(tiny, here)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr("bilora_ray.training.evaluate.evaluate", full)
    line = "out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert error(f"evaluate {adapter}") == f"{line}; take a smaller one: --set per_device_eval_batch_size=N"
