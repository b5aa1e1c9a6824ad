"""Nothing that leaves the house names a path of this machine, and what leaves computes what was trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny_trials import Tiny, run_fit
from torch import Tensor

from bilora_ray import builtin
from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.release import export
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.release.licence import licence_of
from bilora_ray.release.names import name_outside
from bilora_ray.training.compute import memory
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.model import AUTO_CLASS

ORIGIN = {"study": "s", "trial": 3, "eval_loss": 1.5, "baseline": {"kind": "base-model", "eval_loss": 4.25}}
LABELS = {"causal-lm": {}, "sequence-classification": {"num_labels": 2}, "token-classification": {"num_labels": 3}}


@dataclass(frozen=True)
class Trained:
    config: TrialConfig
    adapter: Path


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Trained]:
    """A trial of some tasks, on models and data of folders."""
    made = {}
    for task in LABELS:
        config = tiny.config(task, max_steps=2, eval_steps=2)
        run_fit(config, folder := tmp_path_factory.mktemp(task))
        adapter = TrialFolder(folder).best_adapter()
        assert adapter is not None
        made[task] = Trained(config, adapter)
    return made


@pytest.fixture(scope="module")
def of_the_package(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A step on the built-in model."""
    config = TrialConfig(
        model_name_or_path="builtin:quickstart/model",
        task="causal-lm",
        train_data="builtin:quickstart/validation.jsonl",
        max_length=64,
        max_steps=1,
        max_train_samples=8,
        max_eval_samples=8,
    )
    run_fit(config, folder := tmp_path_factory.mktemp("built-in"))
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    return Trained(config, adapter)


def naming(folder: Path, *paths: Path | str) -> list[str]:
    """The files of `folder` in which one of `paths` is named."""
    return [
        file.name
        for file in sorted(folder.rglob("*"))
        if file.is_file() and any(str(path).encode() in file.read_bytes() for path in paths)
    ]


def paths_here(tiny: Tiny, trial: Trained) -> list[Path | str]:
    return [tiny.folder, trial.adapter.parent, Path.home(), "/tmp/", Path(builtin.__file__).parent, Path.cwd()]


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("task", LABELS)
def test_no_file_that_is_exported_names_a_path(
    task: Task, merged: bool, trained: dict[Task, Trained], tiny: Tiny, tmp_path: Path
) -> None:
    trial = trained[task]
    assert naming(trial.adapter, tiny.folder)  # the trial's own does: it is at home
    (export_merged if merged else export_adapter)(trial.adapter, tmp_path / "out", ORIGIN)
    assert naming(tmp_path / "out", *paths_here(tiny, trial)) == []


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_of_the_built_in_model_neither(merged: bool, of_the_package: Trained, tiny: Tiny, tmp_path: Path) -> None:
    (export_merged if merged else export_adapter)(of_the_package.adapter, tmp_path / "out", ORIGIN)
    assert naming(tmp_path / "out", *paths_here(tiny, of_the_package)) == []
    if not merged:
        settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "builtin:quickstart/model"


def test_a_path_is_named_from_the_current_folder_or_by_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_outside(str(tmp_path / "data" / "rows.jsonl"), True) == "./data/rows.jsonl"
    assert name_outside("/elsewhere/gpt2", False) == "./gpt2"
    for name in ("gpt2", "org/model", "builtin:quickstart/model", "./gpt2"):
        assert name_outside(name, False) == name
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))  # the current folder holds the home: it would be named
    assert name_outside(str(tmp_path / "home" / "me" / "rows.jsonl"), True) == "./rows.jsonl"


def batch(config: TrialConfig) -> dict[str, Tensor]:
    rows = torch.arange(5, 17).view(2, 6)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def logits(model: Any, config: TrialConfig) -> Tensor:
    with torch.inference_mode():
        return model.eval()(**batch(config)).logits


@pytest.mark.parametrize("task", LABELS)
def test_each_way_to_load_it_gives_the_logits_of_the_trained_one(
    task: Task, trained: dict[Task, Trained], tmp_path: Path
) -> None:
    trial, more = trained[task], LABELS[task]
    config, auto = trial.config, AUTO_CLASS[task]
    assert export_adapter(trial.adapter, tmp_path / "out", ORIGIN, True) == []
    assert export_merged(trial.adapter, tmp_path / "merged", ORIGIN) == []

    def base() -> Any:
        return auto.from_pretrained(config.model_name_or_path, **more)

    expected = logits(PeftModel.from_pretrained(base(), str(trial.adapter)), config)
    alone = base()
    alone.load_adapter(str(tmp_path / "out"))
    assert not torch.allclose(logits(base(), config), expected, atol=1e-3)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path / "out")), config), expected)
    assert torch.equal(logits(alone, config), expected)
    whole = auto.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(whole, config), expected, atol=1e-4)


def test_peft_finds_a_base_of_a_folder_beside_it_and_asks_nobody_else(
    trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trained["causal-lm"]
    export_adapter(trial.adapter, tmp_path / "out", ORIGIN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"\./llama"):
        AutoPeftModelForCausalLM.from_pretrained("out")
    Path("llama").symlink_to(trial.config.model_name_or_path)
    found = logits(AutoPeftModelForCausalLM.from_pretrained("out"), trial.config)
    base = AUTO_CLASS["causal-lm"].from_pretrained("llama")
    assert torch.equal(found, logits(PeftModel.from_pretrained(base, "out"), trial.config))


def test_who_evaluates_elsewhere_is_told_what_to_name(
    trained: dict[Task, Trained], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_adapter(trained["causal-lm"].adapter, tmp_path / "out", ORIGIN)
    monkeypatch.chdir(tmp_path)
    said = "is not in the current folder, from which an export names it; give --set"
    result = CliRunner().invoke(main, ["evaluate", "out"])
    assert result.exit_code == 2
    assert result.stderr == f"Error: model_name_or_path: ./llama {said} model_name_or_path=PATH\n"
    result = CliRunner().invoke(main, ["evaluate", "out", f"--set=model_name_or_path={tiny.model('causal-lm')}"])
    line = f"train_data: ./texts-train.jsonl {said} train_data=PATH or --data FILE"
    assert result.stderr == f"Error: {line}\n"


def test_a_copy_that_computes_something_else_is_not_kept(
    trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bent(folder: Path, config: TrialConfig) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor * 1.001 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")

    monkeypatch.setattr(export, "rename_base", bent)
    with pytest.raises(UserError, match="its copy computes something else"):
        export_adapter(trained["causal-lm"].adapter, tmp_path / "out", ORIGIN, True)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_lost_on_the_way_is_found(
    trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def headless(folder: Path, config: TrialConfig) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "lora_" in name}
        save_file(kept, folder / "adapter_model.safetensors")

    monkeypatch.setattr(export, "rename_base", headless)
    with pytest.raises(UserError, match=r"is no adapter of this base model \('base_model.model.classifier.weight'\)"):
        export_adapter(trained["sequence-classification"].adapter, tmp_path / "out", ORIGIN, True)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_away_keeps_nobody_from_a_copy(
    trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trained["causal-lm"]
    base = Path(trial.config.model_name_or_path)
    base.rename(base.with_name("away"))
    try:
        (note,) = export_adapter(trial.adapter, tmp_path / "out", ORIGIN, True)
    finally:
        base.with_name("away").rename(base)
    assert note == f"what was written was not loaded and compared: the base model {base} is not on this machine"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_base_that_does_not_fit_is_not_loaded(
    trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    (note,) = export_adapter(trained["causal-lm"].adapter, tmp_path / "out", ORIGIN, True)
    assert note.startswith("what was written was not loaded and compared: the base model takes 0.0 GB, and 0.0 GB are")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_card_has_scores_beside_their_baseline_and_what_it_was_made_from(
    trained: dict[Task, Trained], tmp_path: Path
) -> None:
    trial = trained["causal-lm"]
    export_adapter(trial.adapter, tmp_path / "out", ORIGIN)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| this adapter | 1.5 |\n| the base model alone | 4.25 |\n" in text
    digests = json.loads((trial.adapter / "bilora_ray.json").read_text())["digests"]
    assert f"| train_data | `./texts-train.jsonl` | `{digests['train_data']}` |\n" in text
    assert f"| model_name_or_path | `./llama` | `{digests['model_name_or_path']}` |\n" in text
    assert "vllm serve ./llama --enable-lora --max-lora-rank 16 --lora-modules adapter=." in text
    export_adapter(trial.adapter, tmp_path / "bare", {"study": "s", "trial": 3})
    assert "this adapter" not in (tmp_path / "bare" / "README.md").read_text()  # absent, not guessed


def test_what_the_hub_reads_of_a_card_is_what_it_takes(trained: dict[Task, Trained], tmp_path: Path) -> None:
    trial = trained["causal-lm"]
    export_adapter(trial.adapter, tmp_path / "out", ORIGIN)
    recipe = json.loads((tmp_path / "out" / "bilora_ray.json").read_text())
    recipe["settings"] |= {"model_name_or_path": "org/model", "train_data": "org/data", "validation_data": None}
    (tmp_path / "out" / "bilora_ray.json").write_text(json.dumps(recipe))
    export_adapter(tmp_path / "out", tmp_path / "again", ORIGIN)
    assert ModelCard.load(tmp_path / "again" / "README.md").data.to_dict() == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "datasets": ["org/data"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/model", "bilora", "bilora-ray", "lora", "transformers"],
    }


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "---\nlicense: llama3\n---\n", {"license": "llama3"}),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("LICENSE", "\n    Apache License\n  Version 2.0, January 2004\n", {"license": "apache-2.0"}),
        ("LICENSE", "Do as I say.", {"license": "other", "license_name": "see-base-model"}),
        ("README.md", "no front matter", {}),
    ],
)
def test_a_licence_is_what_the_base_says_itself(file: str, text: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    config = TrialConfig(model_name_or_path=str(tmp_path), task="causal-lm", train_data="org/data")
    assert licence_of(config) == expected


def test_the_built_in_models_licence_is_the_packages() -> None:
    config = TrialConfig(model_name_or_path="builtin:quickstart/model", task="causal-lm", train_data="org/data")
    assert licence_of(config) == {"license": "apache-2.0"}
