"""The example is run as a reader runs it: it learns, and what it leaves is an ordinary LoRA adapter."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bilora_ray import builtin
from bilora_ray.method import auxiliary_parameters, has_auxiliary

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bilora_loop.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop") / "adapter"


@pytest.fixture(scope="module")
def names(folder):
    """What the script's names stand for at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(EXAMPLE), str(folder)])
        return runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_it_learns_on_both_sides_of_the_perturbation(names):
    assert names["eval_losses"][-1] < names["eval_losses"][0]
    assert names["train_losses"][-1] < names["train_losses"][0] / 4
    norm = float(names["optimizer"].auxiliary_norm)
    assert 0 < norm <= names["RHO"] * (1 + 1e-6)


def test_plain_peft_loads_what_it_exports_with_identical_logits(names, folder):
    base = AutoModelForCausalLM.from_pretrained(builtin.path("quickstart/model"))
    unadapted = AutoModelForCausalLM.from_pretrained(builtin.path("quickstart/model")).eval()
    served = PeftModel.from_pretrained(base, folder).eval()
    assert not has_auxiliary(served)
    ids = names["data"]["validation"][0]
    with torch.no_grad():
        logits = served(input_ids=ids).logits
        assert torch.equal(logits, names["model"](input_ids=ids).logits)
        assert not torch.allclose(logits, unadapted(input_ids=ids).logits, atol=0.1)


def test_no_auxiliary_is_exported(names, folder):
    assert auxiliary_parameters(names["model"])
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    weights = load_file(folder / "adapter_model.safetensors")
    assert not [name for name in weights if "auxiliary" in name]
    assert all(min(tensor.shape) == 8 for tensor in weights.values())
