"""Full fine-tuning: its plain twin in float64, its masters in bf16, tied weights, and what it refuses."""

import copy

import pytest
import torch
from test_optimizer import of, train
from test_reference import fresh_batch, loss_in_float64, loss_of_weights
from tiny import closure_of, norm_in_float64, primary_model, whole_model

from bilora_ray.method import build_method
from bilora_ray.method.full import MASTER, FullAdamW
from bilora_ray.method.reference import AdamW
from bilora_ray.method.reference_rivals import ReferenceFull

STEPS = 50


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("family", ["mlp", "llama", "gpt2"])  # gpt2's output layer is its embeddings
def test_it_equals_its_twin(family, max_grad_norm):
    model, batch = whole_model(family, torch.float64)
    norm_in_float64(model)
    base, start = copy.deepcopy(model), weights_of(model)
    given = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": max_grad_norm}
    optimizer, plain = build_method("full", model, **given), ReferenceFull(weights_of(model), **given)
    model.train()
    for step in range(STEPS):
        inputs = fresh_batch(batch, step)
        fast = optimizer.step(closure_of(model, optimizer, inputs, loss_in_float64))
        assert float(fast.detach()) == pytest.approx(plain.step(loss_of_weights(base, inputs)), rel=1e-10)
    for name, parameter in model.named_parameters():
        assert (parameter - plain.W[name]).abs().max() <= 1e-10, name
    assert (
        min(float((parameter.detach() - start[name]).abs().max()) for name, parameter in model.named_parameters())
        > 1e-3
    )


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_in_bf16_the_weights_are_masters_in_fp32_rounded(max_grad_norm):
    model, batch = whole_model("llama", torch.bfloat16)
    model.lm_head.float()  # as a new head is
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    given = {"learning_rate": 1e-4, "weight_decay": 0.1}
    optimizer = FullAdamW(model, **given, max_grad_norm=max_grad_norm)
    twins = {name: (weight.double(), AdamW(**given)) for name, weight in weights_of(model).items()}
    for step in range(STEPS):
        optimizer.step(closure_of(model.train(), optimizer, fresh_batch(batch, step)))
        gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        share = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
        twins = {name: (adam.moved(w, gradients[name] * share), adam) for name, (w, adam) in twins.items()}
    moved = 0
    for name, parameter in model.named_parameters():
        state, twin = optimizer.state[parameter], twins[name][0]
        master = state.get(MASTER, parameter)
        assert master.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert (master is parameter) == (name == "lm_head.weight")
        torch.testing.assert_close(master.double(), twin, rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter, master.to(parameter.dtype))
        moved += int((master.to(torch.bfloat16) != master).sum())
    assert moved > 1000, "the masters hold no more than the weights"


def test_bf16_alone_would_stand_still():
    """What masters are for: steps below the rounding of a weight add up in fp32, and are lost in bf16."""
    start = torch.full((4,), 1.0, dtype=torch.bfloat16)
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight = torch.nn.Parameter(start.clone()[None])
    plain = torch.nn.Parameter(start.clone())
    ours, theirs = FullAdamW(model, learning_rate=1e-3), torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        model.weight.grad, plain.grad = torch.ones_like(model.weight), torch.ones_like(plain)
        ours.step()
        theirs.step()
    assert torch.equal(plain, start)
    assert float(model.weight[0, 0].detach()) == pytest.approx(0.98, abs=2**-9)


def test_a_tied_weight_stays_one():
    model, batch = whole_model("gpt2")
    optimizer = build_method("full", model, **of("full"))
    train(model, optimizer, batch, 3)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(parameter is model.lm_head.weight for parameter in optimizer.param_groups[0]["params"]) == 1


def test_what_its_class_has_frozen_stays():
    model, batch = whole_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = model.lm_head.weight.detach().clone()
    train(model, build_method("full", model, **of("full")), batch, 3)
    assert torch.equal(model.lm_head.weight, before)


def test_a_model_with_an_adapter_is_refused():
    model, _ = primary_model("llama")
    with pytest.raises(ValueError, match="the model without an adapter"):
        build_method("full", model, **of("full"))
