"""Primaries besides plain LoRA: what each begins as, and where the auxiliary perturbs beside it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from test_optimizer import of, train
from tiny import TASK_TYPE, bilora_model, closure_of, primary_model, randomize
from torch import Tensor

from bilora_ray.method import METHODS, BiLoraAdamW, build_method
from bilora_ray.method.primaries import weight_in_rows, with_exact_magnitudes

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def layers_of(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def weights_of(model: PeftModel) -> list[Tensor]:
    """The weight that each layer computes with in its mode, n x m, by what it makes of single inputs."""
    found = []
    for layer in layers_of(model):
        x = torch.eye(layer.in_features, dtype=weight_in_rows(layer).dtype)
        found.append((layer(x) - layer(torch.zeros_like(x))).detach())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mlp", "gpt2"])
def test_rho_is_of_what_is_added_to_the_weight_whatever_the_primary_is(kind: str, family: str) -> None:
    model, batch = bilora_model(family, dtype=torch.float64, **KINDS[kind])
    optimizer = BiLoraAdamW(model, learning_rate=1e-2, rho=0.05, max_grad_norm=None)
    for _ in range(4):
        optimizer.step(closure_of(model.train(), optimizer, batch))
    perturbed = weights_of(model.train())
    changes = [there - here for there, here in zip(perturbed, weights_of(model.eval()), strict=True)]
    norm = torch.stack([change.norm() for change in changes]).norm()
    torch.testing.assert_close(norm, optimizer.auxiliary_norm, rtol=1e-9, atol=0)
    torch.testing.assert_close(norm, norm.new_tensor(0.05), rtol=1e-9, atol=0)


def test_rslora_scales_by_the_root_of_the_rank_and_its_auxiliary_does_not() -> None:
    model, _ = bilora_model("mlp", dtype=torch.float64, use_rslora=True)  # rank 4, lora_alpha 8
    assert {layer.scaling["default"] for layer in layers_of(model)} == {8 / 4**0.5}
    assert {layer.scaling["auxiliary"] for layer in layers_of(model)} == {2.0}


def test_rows_of_a_dora_are_as_long_as_its_magnitudes_while_it_learns() -> None:
    model, batch = primary_model("mlp", torch.float64, use_dora=True)
    train(model, build_method("lora", model, **of("lora")), batch, 5)
    for layer, weight in zip(layers_of(model), weights_of(model.eval()), strict=True):
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert not torch.equal(magnitude, weight_in_rows(layer).norm(dim=1))  # it is descended on
        torch.testing.assert_close(weight.norm(dim=0), magnitude, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", [family for family in TASK_TYPE if family != "mlp"])
def test_a_dora_begins_as_its_base_on_bf16_too(family: str) -> None:
    logits = []
    for exact in (False, True):
        model, batch = primary_model(family, torch.bfloat16, use_dora=True)
        if exact:
            assert with_exact_magnitudes(model) is model
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits.float())
    with model.disable_adapter(), torch.no_grad():
        expected = model(**batch).logits.float()
    pefts, ours = ((one - expected).norm() / expected.norm() for one in logits)
    assert ours < 2e-3 < pefts or ours == 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("magnitude" in name for name in trained) == len(layers_of(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_every_primary_that_it_takes(name: str, kind: str) -> None:
    if kind == "dora" and name in ("flat-lora", "rwp"):
        pytest.skip("refused: see test_noise")
    model, batch = primary_model("llama", **KINDS[kind])
    optimizer = build_method(name, model, **of(name))
    optimizer.total_steps = 15
    losses = train(model, optimizer, batch, 15)
    assert losses[-1] < losses[0]
    randomize(model)
