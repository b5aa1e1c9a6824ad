"""A model that was trained whole leaves the house as what it is: no adapter, no path of this machine, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_trials import Tiny, run_fit
from transformers import AutoModelForCausalLM

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config
from bilora_ray.release import export
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.release.served import _load_pyfunc, served
from bilora_ray.release.servers import advice_on
from bilora_ray.runners.scoring import score
from bilora_ray.training.evaluate import evaluate, load_adapted
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.prediction.answers import Asked
from bilora_ray.training.prediction.questions import asking
from bilora_ray.training.probe.untrained import compare

ORIGIN = {"study": "s", "trial": 3, "eval_loss": 1.5, "baseline": {"kind": "base-model", "eval_loss": 4.25}}


class Trained:
    """A trial of full fine-tuning, on models and data of folders."""

    def __init__(self, tiny: Tiny, task: Task, path: Path) -> None:
        self.config = tiny.config(task, method="full", learning_rate=1e-3, max_steps=4, test_data=_rows(tiny, task))
        self.told, self.progress = run_fit(self.config, path)
        self.folder = TrialFolder(path)
        left = self.folder.best_adapter()
        assert left is not None
        self.left = left

    @property
    def best(self) -> dict[str, float]:
        """What was told of what is left."""
        return next(report for report in self.told if report["step"] == self.progress.best_step)


def _rows(tiny: Tiny, task: Task) -> str:
    return str(tiny.config(task).validation_data)


@pytest.fixture(scope="module")
def causal(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny, "causal-lm", tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def labels(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny, "sequence-classification", tmp_path_factory.mktemp("labels"))


def test_its_copy_is_the_model_with_a_card_that_says_so(causal: Trained, tmp_path: Path) -> None:
    output = tmp_path / "model"
    assert export_adapter(causal.left, output, ORIGIN, check=True) == []
    assert {file.name for file in output.iterdir()} == {file.name for file in causal.left.iterdir()} | {"README.md"}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, causal.left))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers"
    assert "full" in card.data.tags
    assert "lora" not in card.data.tags
    assert "# `./llama`, fully fine-tuned" in card.text
    assert "Trained with full fine-tuning by bilora-ray: trial 3 of study `s`" in card.text
    assert "| this model | 1.5 |" in card.text
    assert "vllm serve ." in card.text
    assert "| rank |" not in card.text
    assert "LoRA" not in card.text
    written = "".join(file.read_text() for file in output.iterdir() if file.suffix in (".json", ".md", ".jinja"))
    assert str(Path(causal.config.model_name_or_path).parent) not in written
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() > 0


def test_a_copy_that_computes_something_else_is_not_kept(
    causal: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def torn(source: Path, target: Path) -> None:
        copyfile(source, target)
        if target.name == "model.safetensors":
            tensors = load_file(target)
            tensors["model.norm.weight"][0] += 1.0
            save_file(tensors, target, metadata={"format": "pt"})

    monkeypatch.setattr(export.shutil, "copyfile", torn)
    with pytest.raises(UserError, match="its copy computes something else, and was not kept"):
        export_adapter(causal.left, tmp_path / "model", ORIGIN, check=True)
    assert not (tmp_path / "model").exists()


def test_there_is_nothing_to_merge(causal: Trained, tmp_path: Path) -> None:
    line = "--merge: what the trial has left is a whole model, with nothing to merge; leave --merge out"
    with pytest.raises(UserError, match=f"^{line}$"):
        export_merged(causal.left, tmp_path / "merged", ORIGIN)
    assert not (tmp_path / "merged").exists()


def test_a_server_is_given_the_folder_alone(causal: Trained, labels: Trained) -> None:
    assert advice_on(causal.left, Path("out"), merged=False).commands["vLLM"] == "vllm serve out"
    assert advice_on(labels.left, Path("out"), merged=False).commands == {"vLLM": "vllm serve out --runner pooling"}


def test_mlflow_loads_it_without_a_base_model(causal: Trained, tmp_path: Path) -> None:
    told = served(causal.left, ORIGIN)
    assert (told.kind, told.facts["method"]) == ("model", "full")
    assert told.config.keys() == {"trust_remote_code", "max_new_tokens"}
    told.write(tmp_path / "model")
    loaded = _load_pyfunc(str(tmp_path / "model"), told.config)
    assert list(loaded.predict([{"prompt": "the red fish"}])["prediction"])
    with pytest.raises(UserError, match="is a whole model, so model_name_or_path says nothing"):
        _load_pyfunc(str(tmp_path / "model"), {"model_name_or_path": "other"})


def test_it_is_asked_beside_its_base_model(causal: Trained) -> None:
    config = asking(evaluation_config(causal.left, {}))
    base = asking(evaluation_config(causal.left, {}, base_model=True))
    assert base.model_name_or_path == causal.config.model_name_or_path
    asked = Asked.load(causal.left, config, base)
    assert asked.base is not None
    pairs = zip(asked.model.parameters(), asked.base.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", ["causal", "labels"])
def test_a_winner_is_scored_and_compared_with_its_base_model(kind: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(kind)
    found = score(str(trained.left), trained.config.model_dump())  # its test rows are the validation rows
    assert {key: trained.best[key] for key in found} == found
    comparison = compare(trained.config, trained.folder, trained.left, {}, measured=True)
    assert len(comparison.examples) == 8
    if kind == "causal":
        assert comparison.baseline is not None
        assert comparison.baseline["eval_loss"] > trained.best["eval_loss"]
        assert any(row["adapter"] != row["base_model"] for row in comparison.examples)


def test_its_settings_of_training_are_those_of_its_evaluation(labels: Trained, tmp_path: Path) -> None:
    export_adapter(labels.left, tmp_path / "model", ORIGIN)
    data = {key: str(getattr(labels.config, key)) for key in ("train_data", "validation_data")}
    config = evaluation_config(tmp_path / "model", data)
    assert Path(config.model_name_or_path) == tmp_path / "model"
    model, loaded, _ = load_adapted(tmp_path / "model", config)
    config = config.model_copy(update={"label_names": loaded.label_names})
    found = evaluate(model, loaded.validation, config, loaded.tokenizer)
    assert {key: labels.best[key] for key in found} == found


def test_its_recipe_knows_no_setting_of_an_adapter_as_its_own(causal: Trained) -> None:
    settings = json.loads((causal.left / "bilora_ray.json").read_text())["settings"]
    assert TrialConfig(**settings).leaves_model
