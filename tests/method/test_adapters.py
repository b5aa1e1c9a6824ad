"""Attach, detach, export, and all the ways by which the auxiliary must not leak."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import save_and_load
from safetensors.torch import load_file
from tiny import FAMILIES, bilora_model, primary_model, randomize
from torch import nn

from bilora_ray.method import (
    attach_auxiliary,
    auxiliary_factors,
    auxiliary_parameters,
    detach_auxiliary,
    export_primary,
    has_auxiliary,
    primary_parameters,
)


def test_the_auxiliary_starts_at_zero_in_fp32_with_the_primarys_nominal_scaling():
    model, _ = bilora_model("llama", rank=3, dtype=torch.bfloat16, use_rslora=True, alpha_pattern={"q_proj": 1})
    for factors in auxiliary_factors(model):
        assert factors.scaling == 2.0
        assert factors.A.shape[0] == factors.B.shape[1] == 3
        assert factors.A.dtype == factors.B.dtype == torch.float32
        assert factors.A.abs().max() > 0
        assert factors.B.abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_changes_neither_what_is_trained_beside_it_nor_any_value(family):
    plain, _ = primary_model(family)
    model, _ = bilora_model(family)
    ours, theirs = primary_parameters(model), primary_parameters(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(parameter.requires_grad for parameter in auxiliary_parameters(model).values())
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_gives_back_the_plain_model(family):
    plain, _ = primary_model(family)
    model, _ = bilora_model(family)
    detach_auxiliary(model)
    assert not has_auxiliary(model)
    assert auxiliary_parameters(model) == {}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert list(map(type, model.modules())) == list(map(type, plain.modules()))
    assert primary_parameters(model).keys() == primary_parameters(plain).keys()
    attach_auxiliary(model, 2)
    assert has_auxiliary(model)


def adapter_config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if key == "target_modules" else value for key, value in config.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_what_plain_lora_writes(family, tmp_path):
    model, _ = bilora_model(family)
    randomize(model)
    export_primary(model, tmp_path / "ours")
    assert model.training
    assert has_auxiliary(model)
    plain = copy.deepcopy(model)
    detach_auxiliary(plain)
    plain.save_pretrained(tmp_path / "plain")
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert names == {file.name for file in (tmp_path / "plain").iterdir()}
    assert adapter_config(tmp_path / "ours") == adapter_config(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_adapter_gives_identical_outputs(family, tmp_path):
    model, batch = bilora_model(family)
    randomize(model)
    export_primary(model, tmp_path)
    base = copy.deepcopy(model)
    detach_auxiliary(base)
    served = PeftModel.from_pretrained(base.unload(), tmp_path)
    assert torch.equal(served.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_with_the_auxiliary_attached_merges_the_primary_only(family):
    model, batch = bilora_model(family, dtype=torch.float64)
    randomize(model)
    expected = model.eval()(**batch).logits
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.eval()(**batch).logits, expected, rtol=1e-10, atol=1e-10)
    assert not any("lora" in key for key in merged.state_dict())


def test_generation_does_not_see_the_auxiliary():
    model, batch = bilora_model("llama")
    randomize(model, size=2.0)
    plain = copy.deepcopy(model)
    detach_auxiliary(plain)
    ours, theirs = (
        m.eval().generate(input_ids=batch["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=0)
        for m in (model, plain)
    )
    assert torch.equal(ours, theirs)


def test_asking_for_the_auxiliary_is_an_error():
    model, batch = bilora_model("llama")
    for ask in (
        lambda: model.set_adapter("auxiliary"),
        lambda: model.base_model.set_adapter(["default", "auxiliary"]),
        lambda: model.merge_adapter(adapter_names=["auxiliary"]),
        lambda: model.merge_and_unload(adapter_names=["default", "auxiliary"]),
        lambda: model.eval()(**batch, adapter_names=["auxiliary"] * 3),
    ):
        with pytest.raises(ValueError, match="auxiliary"):
            ask()


def test_activating_the_primary_leaves_the_auxiliary_trainable():
    model, _ = bilora_model("bert")
    trained = primary_parameters(model).keys()
    model.set_adapter("default")
    assert all(parameter.requires_grad for parameter in auxiliary_parameters(model).values())
    with model.disable_adapter():
        assert not any(parameter.requires_grad for parameter in auxiliary_parameters(model).values())
    assert all(parameter.requires_grad for parameter in auxiliary_parameters(model).values())
    assert primary_parameters(model).keys() == trained


def test_a_model_can_be_pickled_with_its_auxiliary():
    model, batch = bilora_model("llama")
    randomize(model)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 # our own bytes
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert len(auxiliary_factors(again)) == len(auxiliary_factors(model))


def test_disabled_adapters_are_the_base_model_in_training_too():
    model, batch = bilora_model("llama")
    randomize(model)
    base = copy.deepcopy(model).unload()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base.train()(**batch).logits)


@pytest.mark.parametrize(
    ("config", "embeddings"),
    [
        ({}, set()),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"embed_tokens"}),
        ({"target_modules": r".*(q_proj|lm_head)"}, {"lm_head"}),
        ({"modules_to_save": ["embed_tokens"]}, {"embed_tokens"}),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, {"embed_tokens"}),
    ],
)
def test_embeddings_are_exported_where_peft_would_and_nobody_is_asked(config, embeddings, tmp_path, monkeypatch):
    model, _ = primary_model("llama", **config)
    expected = get_peft_model_state_dict(model)  # of a model without a name, of which PEFT asks nobody
    model.peft_config["default"].base_model_name_or_path = "someone/model"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    export_primary(model, tmp_path)
    exported = load_file(tmp_path / "adapter_model.safetensors")
    assert exported.keys() == expected.keys()
    found = {name for name in ("embed_tokens", "lm_head") if any(name in key for key in exported)}
    assert (found, asked) == (embeddings, [])


def test_export_refuses_a_merged_adapter(tmp_path):
    model, _ = bilora_model("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge.*q_proj"):
        export_primary(model, tmp_path)
    model.unmerge_adapter()
    export_primary(model, tmp_path)


class Odd(nn.Module):
    """One module of each kind that an adapter can sit on."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.image = nn.Conv2d(3, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(4, 8, 8))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["linear", "tokens"]}, "tokens"),
        ({"target_modules": ["linear", "image"]}, "image"),
        ({"target_modules": ["linear", "attention"]}, "attention"),
        ({"target_modules": ["linear"], "target_parameters": ["experts.weight"]}, "experts"),
        ({"target_modules": ["linear"], "trainable_token_indices": {"tokens": [1, 2]}}, "tokens"),
    ],
    ids=["embedding", "convolution", "attention", "experts", "tokens"],
)
def test_modules_that_are_not_linear_are_refused_by_name(config, named):
    model = get_peft_model(Odd(), LoraConfig(r=2, **config))
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=named):
        attach_auxiliary(model, 2)
    assert model.state_dict().keys() == keys


def test_models_that_cannot_have_an_auxiliary_are_refused():
    model, _ = bilora_model("llama")
    with pytest.raises(ValueError, match="already has an auxiliary"):
        attach_auxiliary(model, 2)
    plain, _ = primary_model("llama")
    with pytest.raises(ValueError, match="rank"):
        attach_auxiliary(plain, 0)
    with pytest.raises(ValueError, match="no auxiliary"):
        detach_auxiliary(plain)
    with pytest.raises(ValueError, match="no auxiliary"):
        auxiliary_factors(plain)
    with pytest.raises(ValueError, match="LoRA model, not LlamaForCausalLM"):
        attach_auxiliary(copy.deepcopy(plain).unload(), 2)
    prompted = get_peft_model(
        copy.deepcopy(plain).unload(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="LoRA"):
        attach_auxiliary(prompted, 2)
    plain.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        attach_auxiliary(plain, 2)
    named = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), adapter_name="mine")
    with pytest.raises(ValueError, match="'default'"):
        attach_auxiliary(named, 2)
