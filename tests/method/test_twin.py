"""The fast code against the literal twin, in float64, over many steps on fresh random inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import closure_of, primary_model, randomize
from twin import Layer, Twin

from bilora_ray.method import BiLoraAdamW, attach_auxiliary
from bilora_ray.method.layers import AUXILIARY, PRIMARY, PerturbedLayer

SETTINGS = {"weight_decay": 0.1, "rho": 0.05}
STEPS = 60


def twin_of(model, base, **settings):
    prefix = "base_model.model."
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, PerturbedLayer):
            factors = [
                value.detach().clone() if isinstance(value, torch.Tensor) else value
                for adapter in (PRIMARY, AUXILIARY)
                for value in module.factors(adapter)
            ]
            layers[f"{name.removeprefix(prefix)}.weight"] = Layer(module.base_layer.weight.detach().clone(), *factors)
    return Twin(base, layers, **settings)


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


@pytest.mark.parametrize(
    ("family", "max_grad_norm"), [("mlp", None), ("mlp", 0.05), ("llama", None), ("llama", 0.05), ("t5", 0.05)]
)
def test_equals_the_literal_twin(family, max_grad_norm):
    # One layer has its own alpha, so that s1 != s2 somewhere and both branches of the fused forward are taken.
    pattern = {"mlp": "second", "llama": "q_proj", "t5": "wo"}[family]
    model, batch = primary_model(family, torch.float64, alpha_pattern={pattern: 3})
    base = copy.deepcopy(model).merge_and_unload()  # B1 = 0: merging changes nothing
    attach_auxiliary(model, rank=3)
    optimizer = BiLoraAdamW(
        model, learning_rate=2e-3, auxiliary_learning_rate=7e-4, max_grad_norm=max_grad_norm, **SETTINGS
    )
    twin = twin_of(model, base, lr=2e-3, lr2=7e-4, max_grad_norm=max_grad_norm, **SETTINGS)
    model.train()
    clipped = 0
    for step in range(STEPS):
        inputs = fresh_batch(batch, step)
        fast = optimizer.step(closure_of(model, optimizer, inputs, loss_in_float64))
        slow = twin.step(lambda forward, inputs=inputs: loss_in_float64(forward(**inputs), inputs))
        assert float(fast.detach()) == pytest.approx(slow, rel=1e-10)
        assert float(optimizer.auxiliary_norm) == pytest.approx(twin.norm(), rel=1e-9)
        clipped += twin.norm() > SETTINGS["rho"] * (1 - 1e-9)
    assert clipped > 0, "the radius was never reached: the test says nothing about Eq. 10"
    for name, layer in twin.layers.items():
        module = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        for adapter, A, B in ((PRIMARY, layer.A1, layer.B1), (AUXILIARY, layer.A2, layer.B2)):
            torch.testing.assert_close(module.lora_A[adapter].weight.detach(), A, rtol=0, atol=1e-8)
            torch.testing.assert_close(module.lora_B[adapter].weight.detach(), B, rtol=0, atol=1e-8)


def test_one_step_from_random_factors_moves_each_factor_as_equation_9_says():
    model, batch = primary_model("mlp", torch.float64)
    base = copy.deepcopy(model).merge_and_unload()
    attach_auxiliary(model, rank=3)
    randomize(model)
    settings = {"rho": 1e9, "weight_decay": 0.0, "max_grad_norm": None}
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, auxiliary_learning_rate=2e-3, **settings)
    twin = twin_of(model, base, lr=1e-3, lr2=2e-3, **settings)
    optimizer.step(closure_of(model.train(), optimizer, batch))
    twin.step(lambda forward: forward(**batch).loss)
    for name, layer in twin.layers.items():
        module = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        expected = {PRIMARY: (layer.A1, layer.B1), AUXILIARY: (layer.A2, layer.B2)}
        for adapter, (A, B) in expected.items():
            torch.testing.assert_close(module.lora_A[adapter].weight.detach(), A, rtol=0, atol=1e-13)
            torch.testing.assert_close(module.lora_B[adapter].weight.detach(), B, rtol=0, atol=1e-13)
