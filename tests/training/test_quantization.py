"""QLoRA: adapters on a base whose weights bitsandbytes holds in 4 or 8 bits, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_trials import METHODS, Tiny, evaluate_adapter, reproducible, run_fit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.recipe import evaluation_config
from bilora_ray.release.export import export_merged
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are what bitsandbytes wants: multiples of 64."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    config = AutoConfig.from_pretrained(tiny.model("causal-lm"))
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.model("causal-lm")).save_pretrained(folder)
    return folder


def settings(tiny: Tiny, model: Path, quantization: str, **changes: Any) -> TrialConfig:
    return tiny.config("causal-lm", model_name_or_path=str(model), quantization=quantization, **changes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_quantised_base_is_trained_on_and_its_adapter_measures_the_same_elsewhere(
    quantization: str, kind: str, method: str, tiny: Tiny, model: Path, tmp_path: Path
) -> None:
    config = settings(tiny, model, quantization, method=method, max_steps=24, eval_steps=8)
    run = Run(config, TrialFolder(tmp_path / "looked-at"))
    layers = [module.base_layer for module in run.model.modules() if hasattr(module, "base_layer")]
    assert {type(layer).__name__ for layer in layers} == {kind}
    reports, progress = run_fit(config, tmp_path / "trial")
    assert reports[-1]["eval_loss"] < reports[0]["eval_loss"]
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    again = evaluate_adapter(adapter, evaluation_config(adapter, {}))
    assert again["eval_loss"] == progress.best_value


@pytest.mark.parametrize(("quantization", "primary"), [("nf4", "dora"), ("int8", "rslora")])
def test_other_primaries_are_trained_on_a_quantised_base_and_measure_the_same_elsewhere(
    quantization: str, primary: str, tiny: Tiny, model: Path, tmp_path: Path
) -> None:
    config = settings(tiny, model, quantization, primary=primary, max_steps=12, eval_steps=4)
    reports, progress = run_fit(config, tmp_path / "trial")
    assert reports[-1]["eval_loss"] < reports[0]["eval_loss"]
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    again = evaluate_adapter(adapter, evaluation_config(adapter, {}))
    assert again["eval_loss"] == pytest.approx(progress.best_value, rel=1e-6)


def test_a_quantised_trial_goes_on_exactly(tiny: Tiny, model: Path, tmp_path: Path) -> None:
    config = settings(tiny, model, "nf4", max_steps=8, eval_steps=2)
    whole, _ = run_fit(config, tmp_path / "whole")
    begun = Run(config, TrialFolder(tmp_path / "parts"))
    for _ in range(4):
        begun.train_step()
        if begun.evaluation_due():
            begun.evaluate()
    parts, _ = run_fit(config, tmp_path / "parts")
    assert reproducible(parts) == reproducible(whole)


def test_the_adapter_of_a_quantised_base_loads_in_plain_peft(tiny: Tiny, model: Path, tmp_path: Path) -> None:
    run_fit(settings(tiny, model, "nf4"), tmp_path)
    adapter = TrialFolder(tmp_path).best_adapter()
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantised)
    loaded = PeftModel.from_pretrained(base, str(adapter))
    assert {name.split(".")[-2] for name, _ in loaded.named_parameters() if "lora_" in name} == {"default"}


def test_the_merged_model_of_a_quantised_base_has_whole_weights(tiny: Tiny, model: Path, tmp_path: Path) -> None:
    config = settings(tiny, model, "nf4")
    _, progress = run_fit(config, tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    assert progress.best_value is not None
    (note,) = export_merged(adapter, tmp_path / "merged", {"eval_loss": progress.best_value})
    moved, again = note.split("; ")
    start, _, share = moved.rpartition(" ")
    assert start == (
        "quantization: the adapter was trained on nf4 weights and is merged into whole ones, which moves the logits by"
    )
    assert 1 < float(share.removesuffix("%")) < 100
    # What it is worth as it is now, beside what it was worth.
    rows = {"train_data": config.train_data, "validation_data": config.validation_data}
    measured = evaluate_adapter(None, evaluation_config(tmp_path / "merged", rows))["eval_loss"]
    told = f"eval_loss is {measured:.6g}, {progress.best_value:.6g} with the adapter"
    assert again == f"measured again on its validation rows, {told}"
    assert measured != progress.best_value
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter)).eval()
    rows = torch.arange(3, 40).view(1, -1)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert torch.allclose(merged.eval()(rows).logits, loaded(rows).logits, atol=1e-4)


def test_without_bitsandbytes_the_line_says_what_to_install(
    tiny: Tiny, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        run_fit(settings(tiny, model, "int8"), tmp_path)
    line = "quantization: needs the package bitsandbytes: pip install 'bilora-ray[quantization]'"
    assert str(error.value) == line
