"""Heads, and the modules that adapters are put on."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import load_file
from tiny_trials import Tiny, evaluate_adapter, run_fit
from transformers import AutoModelForSequenceClassification

from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.model import load_base, load_tokenizer
from bilora_ray.training.rehearsal import rehearse

TASK: Task = "sequence-classification"
NAMES = {0: "bad", 1: "good"}


def adapter_of(base: Path, tiny: Tiny, folder: Path, **changes: Any) -> Path:
    config = tiny.config(TASK, model_name_or_path=str(base), max_length=48, max_steps=2, eval_steps=2, **changes)
    rehearse(config)
    run_fit(config, folder)
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    return adapter


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("llama", {"score.weight"}),
        ("bart", {"classification_head.out_proj.weight", "classification_head.out_proj.bias"}),
    ],
)
def test_a_head_for_other_labels_is_trained_anew(
    family: str, head: set[str], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(TASK, family, tiny, tmp_path / "base", num_labels=3)
    adapter = adapter_of(base, tiny, tmp_path / "trial")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in head} == {name for name in tensors if "lora_" not in name}
    config = evaluation_config(adapter, {})
    expected = evaluate_adapter(adapter, config)
    assert evaluate_adapter(adapter, config.model_copy(update={"seed": 5})) == expected
    export_merged(adapter, tmp_path / "merged", {})
    monkeypatch.chdir(tiny.folder)
    assert evaluate_adapter(None, evaluation_config(tmp_path / "merged", {})) == pytest.approx(expected, rel=1e-4)
    export_adapter(adapter, tmp_path / "exported", {"study": "s", "trial": 0})
    code, _ = re.findall(r"```python\n(.*?)```", (tmp_path / "exported" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "load.py").write_text(code.replace('"."', '"exported"'))
    monkeypatch.chdir(tmp_path)  # where the base model is, under the name that the card has
    model = runpy.run_path(str(tmp_path / "load.py"))["model"]
    assert model.config.id2label == NAMES


def test_weights_that_are_no_head_are_not_replaced(tiny: Tiny, tmp_path: Path) -> None:
    base = build(TASK, "bert", tiny, tmp_path / "base")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 48'))
    settings = tiny.config(TASK, model_name_or_path=str(base), max_length=48)
    with pytest.raises(UserError, match=r"cannot load '.*' \(its files hold bert\.encoder.* in another shape than"):
        load_base(settings, load_tokenizer(settings), ("bad", "good"))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_says_its_labels_and_is_served_with_its_padding(
    family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(TASK, family, tiny, tmp_path / "base", pad_token_id=7)
    adapter = adapter_of(base, tiny, tmp_path / "trial")
    export_merged(adapter, tmp_path / "merged", {})
    export_adapter(adapter, tmp_path / "exported", {"study": "s", "trial": 0})
    code, _ = re.findall(r"```python\n(.*?)```", (tmp_path / "exported" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "load.py").write_text(code.replace('"."', '"exported"'))
    monkeypatch.chdir(tmp_path)  # where the base model is, under the name that the card has
    shown = runpy.run_path(str(tmp_path / "load.py"))["model"]
    for model in (shown, AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")):
        assert model.config.id2label == NAMES
        assert model.config.label2id == {"bad": 0, "good": 1}
        assert model.config.pad_token_id == load_tokenizer(evaluation_config(adapter, {})).pad_token_id


def test_what_a_head_says_in_bf16_is_not_rounded(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(TASK, model_name_or_path=str(tiny.model(TASK)), precision="bf16")
    tokenizer = load_tokenizer(config)
    model, _ = load_base(config, tokenizer, ("bad", "good"))
    assert model.dtype == torch.bfloat16
    assert (
        model(**tokenizer(["red green"], return_tensors="pt", return_token_type_ids=False)).logits.dtype
        == torch.float32
    )


def test_a_layer_whose_name_ends_as_a_heads_is_trained_with_it(tiny: Tiny, tmp_path: Path) -> None:
    # The base has all of its head already, so that nothing starts random.
    adapter = adapter_of(build(TASK, "distilbert", tiny, tmp_path / "base"), tiny, tmp_path / "trial")
    tensors = load_file(adapter / "adapter_model.safetensors")
    heads = {
        f"base_model.model.{name}.{kind}" for name in ("classifier", "pre_classifier") for kind in ("weight", "bias")
    }
    assert {name for name in tensors if "lora_" not in name} == heads
