"""The properties that any implementation of Bi-LoRA must have; one test each, named by the property."""

import copy

import pytest
import torch
from tiny import bilora_model, closure_of, primary_model, randomize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilora_ray.method import (
    BiLoraAdamW,
    Factors,
    LoraAdamW,
    auxiliary_factors,
    auxiliary_parameters,
    perturbation_norm,
    primary_parameters,
    project_,
)
from bilora_ray.method.layers import AUXILIARY, PerturbedLayer


def formed_norm(factors):
    return torch.stack([(f.scaling * f.B @ f.A).double().square().sum() for f in factors]).sum().sqrt()


def change_of_products(model, before):
    return [f.scaling * f.B @ f.A - old for f, old in zip(auxiliary_factors(model), before, strict=True)]


def products(model):
    return [(f.scaling * f.B @ f.A).detach().clone() for f in auxiliary_factors(model)]


def test_one_forward_and_one_backward_a_step():
    model, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05)
    counts = {"forward": 0, "backward": 0}

    def count(key):
        counts[key] += 1

    *_, layer = (module for module in model.modules() if isinstance(module, PerturbedLayer))
    layer.base_layer.register_forward_hook(lambda *_: count("forward"))
    layer.register_full_backward_hook(lambda *_: count("backward"))
    for step in range(1, 4):
        optimizer.step(closure_of(model, optimizer, batch))
        assert counts == {"forward": step, "backward": step}


@pytest.mark.parametrize("rho", [0.005, 0.05, 0.5])
def test_the_norm_is_at_most_rho_after_every_step(rho):
    model, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=rho, auxiliary_learning_rate=2e-2)
    for _ in range(10):
        optimizer.step(closure_of(model, optimizer, batch))
        assert formed_norm(auxiliary_factors(model)) <= rho * (1 + 1e-5)


def test_clipping_leaves_the_direction_of_the_product_unchanged():
    model, _ = bilora_model("llama", dtype=torch.float64)
    randomize(model)
    before = torch.cat([product.flatten() for product in products(model)])
    assert before.norm() > 0.05
    project_(auxiliary_factors(model), 0.05)
    after = torch.cat([product.flatten() for product in products(model)])
    torch.testing.assert_close(after, before * (0.05 / before.norm()), rtol=1e-12, atol=0)


def test_no_clipping_inside_the_ball():
    model, _ = bilora_model("llama")
    randomize(model)
    before = copy.deepcopy(auxiliary_parameters(model))
    norm = project_(auxiliary_factors(model), 1e6)
    assert norm == perturbation_norm(auxiliary_factors(model))
    for name, parameter in auxiliary_parameters(model).items():
        assert torch.equal(parameter, before[name])


def primary_path(model, optimizer, batch, steps=20):
    for _ in range(steps):
        optimizer.step(closure_of(model.train(), optimizer, batch))
    return {name: parameter.detach() for name, parameter in primary_parameters(model).items()}


def test_without_ascent_the_primary_path_is_plain_lora_to_rounding_when_fused():
    model, batch = bilora_model("llama", dtype=torch.float64)
    ours = primary_path(model, BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, auxiliary_learning_rate=0.0), batch)
    plain, batch = primary_model("llama", torch.float64)
    theirs = primary_path(plain, LoraAdamW(plain, learning_rate=1e-3), batch)
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=1e-12)


def test_without_ascent_the_primary_path_is_plain_lora_bit_for_bit_where_the_arithmetic_is_the_same():
    # A DoRA primary runs PEFT's own forward; the auxiliary then adds an exact zero.
    model, batch = bilora_model("llama", use_dora=True)
    ours = primary_path(model, BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, auxiliary_learning_rate=0.0), batch)
    plain, batch = primary_model("llama", use_dora=True)
    theirs = primary_path(plain, LoraAdamW(plain, learning_rate=1e-3), batch)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name


def test_the_perturbation_moves_up_the_gradient_to_first_order():
    model, batch = bilora_model("mlp", dtype=torch.float64)
    randomize(model)
    layers = [module for module in model.modules() if isinstance(module, PerturbedLayer)]
    for layer in layers:
        layer.base_layer.weight.requires_grad_(True)
    weights = [layer.base_layer.weight for layer in layers]
    G = torch.autograd.grad(model(**batch).loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    before = products(model)
    optimizer = BiLoraAdamW(model, learning_rate=0.0, rho=1e9, auxiliary_learning_rate=1e-6)
    loss = optimizer.step(closure_of(model, optimizer, batch))
    inner = sum((g * d).sum() for g, d in zip(G, change_of_products(model, before), strict=True))
    assert inner > 0
    rise = model(**batch).loss - loss
    torch.testing.assert_close(rise, inner, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gram_norm_is_the_norm_of_the_formed_product(dtype):
    shapes = [(40, 30, 4, 2.0), (40, 30, 4, 2.0), (40, 30, 4, 0.5), (64, 20, 1, 2.0), (7, 90, 8, 1.0)]
    torch.manual_seed(0)
    factors = [Factors(torch.randn(r, n, dtype=dtype), torch.randn(m, r, dtype=dtype), s) for m, n, r, s in shapes]
    expected = formed_norm(factors).to(dtype)
    torch.testing.assert_close(
        perturbation_norm(factors), expected, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0
    )


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_product_is_never_formed():
    m, n, r, layers = 300, 200, 2, 3
    factors = [Factors(torch.randn(r, n), torch.randn(m, r), 2.0) for _ in range(layers)]
    with LargestTensor() as largest:
        project_(factors, 0.05)
    assert layers * r * max(m, n) >= largest.elements > 0
    assert largest.elements < m * n


def test_the_descent_limit_does_not_see_the_ascent_gradient():
    def descent_gradients(scale_of_ascent):
        model, batch = bilora_model("mlp", dtype=torch.float64)
        randomize(model)
        optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, max_grad_norm=0.01)

        def closure():
            loss = closure_of(model, optimizer, batch)()
            for parameter in auxiliary_parameters(model).values():
                parameter.grad *= scale_of_ascent
            return loss

        optimizer.step(closure)
        return [parameter.grad for parameter in primary_parameters(model).values()]

    expected = descent_gradients(1.0)
    total = torch.stack([gradient.square().sum() for gradient in expected]).sum().sqrt()
    assert float(total) == pytest.approx(0.01, rel=1e-3)
    for scale in (0.0, 1e6):
        for ours, theirs in zip(descent_gradients(scale), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_each_branch_is_limited_by_itself():
    model, batch = bilora_model("mlp")
    randomize(model)
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, max_grad_norm=0.01)
    optimizer.step(closure_of(model, optimizer, batch))
    for group in optimizer.param_groups:
        norm = torch.stack([parameter.grad.square().sum() for parameter in group["params"]]).sum().sqrt()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_the_auxiliary_has_no_weight_decay():
    def auxiliary_after(weight_decay):
        model, batch = bilora_model("mlp")
        randomize(model)
        optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.5, weight_decay=weight_decay)
        optimizer.step(closure_of(model, optimizer, batch))
        return list(auxiliary_parameters(model).values())

    for without, with_decay in zip(auxiliary_after(0.0), auxiliary_after(0.5), strict=True):
        assert torch.equal(without, with_decay)


def test_modules_to_save_only_descend():
    model, batch = bilora_model("bert")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert list(model.base_model.model.classifier.modules_to_save) == ["default"]
    descent, ascent = optimizer.param_groups
    assert not descent.get("maximize")
    assert any(parameter is head for parameter in descent["params"])
    assert not any(parameter is head for parameter in ascent["params"])
    before = head.detach().clone()
    optimizer.step(closure_of(model, optimizer, batch))
    assert torch.all((head - before) * head.grad <= 0)
    assert not torch.equal(head, before)


def test_train_loss_is_at_the_perturbed_weight_and_evaluation_is_not():
    model, batch = bilora_model("llama", dtype=torch.float64)
    randomize(model)
    optimizer = BiLoraAdamW(model, learning_rate=0.0, rho=1e9, auxiliary_learning_rate=0.0)
    perturbed = copy.deepcopy(model)
    for layer in perturbed.modules():
        if isinstance(layer, PerturbedLayer):
            factors = layer.factors(AUXILIARY)
            layer.base_layer.weight.data += (factors.scaling * factors.B @ factors.A).detach()
            factors.B.data.zero_()
    train_loss = optimizer.step(closure_of(model, optimizer, batch)).detach()
    torch.testing.assert_close(train_loss, perturbed.eval()(**batch).loss.detach(), rtol=1e-12, atol=0)
    assert abs(float(train_loss) - float(model.eval()(**batch).loss.detach())) > 1e-3
