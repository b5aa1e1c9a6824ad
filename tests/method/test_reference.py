"""The fast code against the plain reference, in float64, over many steps on fresh random inputs."""

import ast
import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import closure_of, norm_in_float64, own_loss, primary_model, randomize
from torch.func import functional_call

from bilora_ray.method import BiLoraAdamW, LoraAdamW, attach_auxiliary, reference
from bilora_ray.method.layers import AUXILIARY, PRIMARY
from bilora_ray.method.reference import BiLoraLayer, LoraLayer, ReferenceBiLora, ReferenceLora

STEPS = 60
# One layer has its own alpha, so that s1 != s2 somewhere and both branches of the fused forward are taken.
PATTERN = {"mlp": "second", "llama": "q_proj", "t5": "wo"}


def adapted(model):
    """The adapted layers of a PEFT model, by the name of their weight in the base model."""
    modules = model.get_base_model().named_modules()
    return {f"{name}.weight": module for name, module in modules if PRIMARY in getattr(module, "lora_A", ())}


def factors(layer, adapter):
    """A, B and scaling."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return A.detach().clone(), B.detach().clone(), layer.scaling[adapter]


def reference_layers(model):
    layers = {}
    for name, layer in adapted(model).items():
        W0, primary = layer.base_layer.weight.detach().clone(), factors(layer, PRIMARY)
        has_auxiliary = AUXILIARY in layer.lora_A
        layers[name] = (
            BiLoraLayer(W0, *primary, *factors(layer, AUXILIARY)) if has_auxiliary else LoraLayer(W0, *primary)
        )
    return layers


def assert_same_factors(model, layers, atol):
    for name, layer in adapted(model).items():
        A1, B1, _ = factors(layer, PRIMARY)
        torch.testing.assert_close(A1, layers[name].A1, rtol=0, atol=atol)
        torch.testing.assert_close(B1, layers[name].B1, rtol=0, atol=atol)
        if AUXILIARY in layer.lora_A:
            A2, B2, _ = factors(layer, AUXILIARY)
            torch.testing.assert_close(A2, layers[name].A2, rtol=0, atol=atol)
            torch.testing.assert_close(B2, layers[name].B2, rtol=0, atol=atol)


def fresh_batch(batch, step):
    generator = torch.Generator().manual_seed(step)
    return {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if value.is_floating_point()
        else value[:, torch.randperm(value.shape[1], generator=generator)]
        for key, value in batch.items()
    }


def loss_in_float64(output, batch):
    """transformers computes its own loss in fp32 whatever the model is in."""
    if "y" in batch:
        return output.loss
    return F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())


def loss_of_weights(base, batch, loss_of=loss_in_float64):
    """The loss of a batch as the reference takes it: a function of the weights."""
    return lambda W: loss_of(functional_call(base, W, kwargs=batch), batch)


@pytest.mark.parametrize(
    ("family", "max_grad_norm"), [("mlp", None), ("mlp", 0.05), ("llama", None), ("llama", 0.05), ("t5", 0.05)]
)
def test_bilora_equals_the_reference(family, max_grad_norm):
    model, batch = primary_model(family, torch.float64, alpha_pattern={PATTERN[family]: 3})
    norm_in_float64(model)
    base = copy.deepcopy(model).merge_and_unload()  # B1 = 0: merging changes nothing
    attach_auxiliary(model, rank=3)
    settings = {
        "learning_rate": 2e-3,
        "auxiliary_learning_rate": 7e-4,
        "rho": 0.05,
        "weight_decay": 0.1,
        "max_grad_norm": max_grad_norm,
    }
    optimizer, plain = BiLoraAdamW(model, **settings), ReferenceBiLora(reference_layers(model), **settings)
    model.train()
    clipped = 0
    for step in range(STEPS):
        inputs = fresh_batch(batch, step)
        fast = optimizer.step(closure_of(model, optimizer, inputs, loss_in_float64))
        slow = plain.step(loss_of_weights(base, inputs))
        assert float(fast.detach()) == pytest.approx(slow, rel=1e-10)
        assert float(optimizer.auxiliary_norm) == pytest.approx(plain.auxiliary_norm(), rel=1e-9)
        clipped += plain.auxiliary_norm() > settings["rho"] * (1 - 1e-9)
    assert clipped > 0, "the radius was never reached: the test says nothing about Eq. 10"
    assert_same_factors(model, plain.layers, atol=1e-10)


@pytest.mark.parametrize(("family", "max_grad_norm"), [("mlp", None), ("mlp", 0.05), ("llama", 0.05)])
def test_lora_equals_the_reference(family, max_grad_norm):
    model, batch = primary_model(family, torch.float64, alpha_pattern={PATTERN[family]: 3})
    norm_in_float64(model)
    base = copy.deepcopy(model).merge_and_unload()
    settings = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": max_grad_norm}
    optimizer, plain = LoraAdamW(model, **settings), ReferenceLora(reference_layers(model), **settings)
    model.train()
    for step in range(STEPS):
        inputs = fresh_batch(batch, step)
        fast = optimizer.step(closure_of(model, optimizer, inputs, loss_in_float64))
        assert float(fast.detach()) == pytest.approx(plain.step(loss_of_weights(base, inputs)), rel=1e-10)
    assert_same_factors(model, plain.layers, atol=1e-10)


def test_one_step_from_random_factors_moves_each_factor_as_equation_9_says():
    model, batch = primary_model("mlp", torch.float64)
    base = copy.deepcopy(model).merge_and_unload()
    attach_auxiliary(model, rank=3)
    randomize(model)
    settings = {"learning_rate": 1e-3, "auxiliary_learning_rate": 2e-3, "rho": 1e9}
    optimizer, plain = BiLoraAdamW(model, **settings), ReferenceBiLora(reference_layers(model), **settings)
    optimizer.step(closure_of(model.train(), optimizer, batch))
    plain.step(loss_of_weights(base, batch, own_loss))
    assert_same_factors(model, plain.layers, atol=1e-13)


@pytest.mark.parametrize("rank", [None, 3])
def test_what_leaves_training_is_the_same_weight(rank):
    model, batch = primary_model("mlp", torch.float64)
    base = copy.deepcopy(model).merge_and_unload()
    if rank is not None:
        attach_auxiliary(model, rank)
    randomize(model)
    layers = reference_layers(model)
    plain = (
        ReferenceLora(layers, learning_rate=1.0)
        if rank is None
        else ReferenceBiLora(layers, learning_rate=1.0, rho=1.0)
    )
    evaluated = model.eval()(**batch).logits
    torch.testing.assert_close(
        functional_call(base, plain.weights(), kwargs=batch).logits, evaluated, rtol=0, atol=1e-12
    )


def test_the_auxiliarys_learning_rate_is_the_primarys_if_none_is_given():
    moved = []
    for settings in ({}, {"auxiliary_learning_rate": 1e-3}):
        model, batch = primary_model("mlp", torch.float64)
        base = copy.deepcopy(model).merge_and_unload()
        attach_auxiliary(model, rank=3)
        plain = ReferenceBiLora(reference_layers(model), learning_rate=1e-3, rho=1.0, **settings)
        plain.step(loss_of_weights(base, batch))
        moved.append(plain.auxiliary_norm())
    assert moved[0] == moved[1] > 0


def test_the_reference_needs_torch_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}
