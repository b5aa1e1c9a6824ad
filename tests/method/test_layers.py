"""The fused forward pass against PEFT's own pass with both adapters active: outputs and gradients."""

import copy
import importlib.util

import pytest
import torch
from peft.tuners import lora
from tiny import FAMILIES, activate_both_by_peft, bilora_model, randomize

from bilora_ray.method.layers import PerturbedLayer


def outcome(model, batch, autocast=False):
    """Logits, and the gradient of every trained parameter by name."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return output.logits.detach(), gradients


def pair(family, dtype=torch.float32, **config):
    """A Bi-LoRA model in training mode, the same one as PEFT runs it, and a batch."""
    model, batch = bilora_model(family, dtype=dtype, **config)
    randomize(model)
    reference = copy.deepcopy(model)
    activate_both_by_peft(reference)
    return model, reference, batch


def assert_equal_outcomes(ours, theirs, tolerance):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert gradient is not None, name
        torch.testing.assert_close(ours[1][name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_equals_peft_with_both_adapters(family, dtype, tolerance):
    model, reference, batch = pair(family, dtype)
    assert_equal_outcomes(outcome(model, batch), outcome(reference, batch), tolerance)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_dropout": 0.4},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"up_proj": 7}},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.4},
    ],
    ids=str,
)
def test_equals_peft_for_every_kind_of_primary(config):
    model, reference, batch = pair("llama", torch.float64, **config)
    assert_equal_outcomes(outcome(model, batch), outcome(reference, batch), 1e-12)


def test_equals_peft_with_lora_bias():
    model, reference, batch = pair("bert", torch.float64, lora_bias=True)
    assert_equal_outcomes(outcome(model, batch), outcome(reference, batch), 1e-12)


def test_equals_peft_with_a_pissa_primary():
    model, reference, batch = pair("llama", init_lora_weights="pissa")
    assert_equal_outcomes(outcome(model, batch), outcome(reference, batch), 5e-6)


def test_dropout_is_the_primarys_only():
    model, batch = bilora_model("mlp", dtype=torch.float64, lora_dropout=0.9)
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            torch.nn.init.normal_(layer.lora_B["auxiliary"].weight)
    first, second = (model(**batch).logits for _ in range(2))  # B1 = 0: nothing else could differ
    assert torch.equal(first, second)


def distances(outcome, truth):
    """How far logits and gradients are from the true ones, relative to these."""
    errors = {"logits": (outcome[0].double() - truth[0]).norm() / truth[0].norm()}
    for name, gradient in truth[1].items():
        errors[name] = (outcome[1][name].double() - gradient).norm() / gradient.norm()
    return errors


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_base_is_as_near_to_the_truth_as_pefts_under_autocast(autocast):
    model, reference, _ = pair("llama", torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    ids = torch.randint(3, 40, (8, 16))
    batch = {"input_ids": ids, "labels": ids}
    truth = outcome(copy.deepcopy(model).double(), batch)
    ours, theirs = outcome(model, batch, autocast), outcome(reference, batch, True)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in ours[1].values()} == {torch.float32}
    our_distances, their_distances = distances(ours, truth), distances(theirs, truth)
    assert our_distances["logits"] < 1.1 * their_distances["logits"]
    assert sum(our_distances.values()) < 1.1 * sum(their_distances.values())
    assert max(our_distances.values()) < 0.06


def test_fp32_base_under_autocast():
    model, reference, batch = pair("llama")
    (ours, our_gradients), (theirs, their_gradients) = outcome(model, batch, True), outcome(reference, batch, True)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    for name, gradient in their_gradients.items():
        assert (our_gradients[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-3, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, _, batch = pair("llama", torch.float64, lora_dropout=0.2)
    plain = outcome(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_equal_outcomes(outcome(model, batch), plain, 1e-13)


def test_plain_linear_layers_are_fused_and_others_are_not():
    fused, _ = bilora_model("llama")
    dora, _ = bilora_model("llama", use_dora=True)
    x = torch.empty(1, dtype=torch.bfloat16)
    for model, expected in ((fused, True), (dora, False)):
        layers = [module for module in model.modules() if isinstance(module, PerturbedLayer)]
        assert len(layers) == 14
        assert {layer._can_fuse(x) for layer in layers} == {expected}


def test_evaluation_mode_is_pefts_own_forward():
    model, batch = bilora_model("llama")
    randomize(model)
    ours = model.eval()(**batch).logits
    for layer in model.modules():
        if isinstance(layer, PerturbedLayer):
            layer.__class__ = layer.plain_class
    assert torch.equal(ours, model(**batch).logits)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_equals_peft_on_a_4bit_base():
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    from bilora_ray.method import attach_auxiliary

    torch.manual_seed(0)
    base = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"))
    base.is_loaded_in_4bit = True
    model = get_peft_model(base.to("cpu"), LoraConfig(r=4, target_modules=["0"]))
    attach_auxiliary(model, 3)
    randomize(model.train())
    reference = copy.deepcopy(model)
    activate_both_by_peft(reference)
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)
