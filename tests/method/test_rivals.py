"""What Bi-LoRA is compared with: each against its plain twin in float64, and what a step of it costs."""

import copy

import pytest
import torch
from test_reference import PATTERN, adapted, factors, fresh_batch, loss_in_float64, loss_of_weights, reference_layers
from tiny import closure_of, model_of, norm_in_float64, primary_model, rows_of

from bilora_ray.method import METHODS, build_method, settings_of
from bilora_ray.method.esam import perturbed
from bilora_ray.method.layers import AUXILIARY, PRIMARY
from bilora_ray.method.noise import Draws
from bilora_ray.method.reference_ascent import ReferenceHalfStep, ReferenceTangent
from bilora_ray.method.reference_rivals import (
    ReferenceAblatedBiLora,
    ReferenceBar,
    ReferenceDualLora,
    ReferenceEsam,
    ReferenceLookSam,
    ReferenceLoraSam,
    ReferenceNoisyLora,
)

STEPS = 50
SETTINGS = {
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "rho": 0.05,
    "auxiliary_rank": 3,
    "auxiliary_learning_rate": 7e-4,
    "clip": "global",
    "norm": "effective",
    "ascent": "adamw",
    "looksam_every": 4,
    "looksam_alpha": 0.7,
    "bar_alpha": 0.25,
    "esam_beta": 0.5,
    "esam_gamma": 0.5,
    "rwp_space": "weight",
    "seed": 5,
}
ASCENTS = [("bilora", {"ascent": rule, "auxiliary_learning_rate": None}) for rule in ("tangent", "half-step")]
# Method and settings of its own -> its twin, and what that has beside what all have.
TWINS = [
    ("lora-sam", {}, ReferenceLoraSam, {"rho": 0.05}),
    ("looksam", {}, ReferenceLookSam, {"rho": 0.05, "every": 4, "alpha": 0.7}),
    ("esam", {}, ReferenceEsam, {"rho": 0.05}),
    ("esam", {"esam_beta": 0.8, "esam_gamma": 0.3}, ReferenceEsam, {"rho": 0.05, "beta": 0.8, "gamma": 0.3}),
    ("nbar", {}, ReferenceBar, {"by_gradients": True, "steps": STEPS}),
    ("obar", {"bar_alpha": 3.0}, ReferenceBar, {"by_gradients": False, "alpha": 3.0, "steps": STEPS}),
    ("flat-lora", {"rho": 0.2}, ReferenceNoisyLora, {"rho": 0.2, "steps": STEPS}),
    ("rwp", {}, ReferenceNoisyLora, {"rho": 0.05}),
    ("rwp", {"rwp_space": "lora", "rho": 0.3}, ReferenceNoisyLora, {"rho": 0.3, "on_factors": True}),
    ("dual-lora", {}, ReferenceDualLora, {}),
    ("bilora", {"clip": "per-layer", "rho": 0.01}, ReferenceAblatedBiLora, {"clip": "per-layer"}),
    ("bilora", {"clip": "none"}, ReferenceAblatedBiLora, {"clip": "none"}),
    ("bilora", {"norm": "unscaled"}, ReferenceAblatedBiLora, {"unscaled": True}),
    ("bilora", {"ascent": "tangent", "auxiliary_learning_rate": None}, ReferenceTangent, {}),
    ("bilora", {"ascent": "half-step", "auxiliary_learning_rate": None}, ReferenceHalfStep, {}),
]


@pytest.fixture
def noises(monkeypatch):
    """The noise of the last step, of each tensor that has some."""
    found, at = [], Draws.at

    def recorded(self, *args):
        found[:] = at(self, *args)
        return found

    monkeypatch.setattr(Draws, "at", recorded)
    return found


def draws_of(noises, model):
    """Their numbers, as a twin is given them."""
    tensors = [
        (key, of) for key in adapted(model) for of in (("W",) if len(noises) == len(adapted(model)) else ("A1", "B1"))
    ]
    return {key: noise.draws * noise.scale.sign() for key, noise in zip(tensors, noises, strict=True)}


def settings(name, **own):
    return {key: {**SETTINGS, **own}[key] for key in settings_of(name)}


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("family", ["mlp", "llama"])
@pytest.mark.parametrize(("name", "own", "twin", "told"), TWINS)
def test_each_equals_its_twin(family, max_grad_norm, name, own, twin, told, noises):
    model, batch = primary_model(family, torch.float64, alpha_pattern={PATTERN[family]: 3})
    norm_in_float64(model)
    base = copy.deepcopy(model).merge_and_unload()  # B1 = 0: merging changes nothing
    optimizer = build_method(name, model, **settings(name, max_grad_norm=max_grad_norm, **own))
    optimizer.total_steps = STEPS
    given = {key: {**SETTINGS, **own}[key] for key in ("learning_rate", "weight_decay")}
    if "auxiliary_rank" in settings_of(name):
        given |= {"rho": {**SETTINGS, **own}["rho"]}
        if "ascent" not in own:
            given |= {"auxiliary_learning_rate": SETTINGS["auxiliary_learning_rate"]}
    plain = twin(reference_layers(model), max_grad_norm=max_grad_norm, **given)
    for key, value in told.items():
        setattr(plain, key, value)
    start = {key: [tensor.clone() for tensor in factors(layer, PRIMARY)[:2]] for key, layer in adapted(model).items()}
    model.train()
    for step in range(STEPS):
        inputs = fresh_batch(batch, step)
        fast = optimizer.step(closure_of(model, optimizer, inputs, loss_in_float64))
        if noises:
            plain.draws = draws_of(noises, model)
        if twin is ReferenceEsam:
            places = [(key, of) for key in adapted(model) for of in ("A1", "B1")]
            flags = perturbed(SETTINGS["seed"], step, len(places), plain.beta)
            plain.chosen = {place for place, flag in zip(places, flags, strict=True) if flag}
            value = plain.step_on([loss_of_weights(base, row) for row in rows_of(inputs)])
        else:
            value = plain.step(loss_of_weights(base, inputs))
        assert float(fast.detach()) == pytest.approx(value, rel=1e-10)
    for key, layer in adapted(model).items():
        A1, B1, _ = factors(layer, PRIMARY)
        assert (A1 - plain.layers[key].A1).abs().max() <= 1e-10
        assert (B1 - plain.layers[key].B1).abs().max() <= 1e-10
        assert (B1 - start[key][1]).abs().max() > 1e-3
        if "ascent" in own:  # the sign of a singular vector is anybody's choice
            A2, B2, s2 = factors(layer, AUXILIARY)
            assert s2 * (B2 @ A2 - plain.layers[key].B2 @ plain.layers[key].A2).abs().max() <= 1e-10
        elif AUXILIARY in layer.lora_A:
            A2, B2, _ = factors(layer, AUXILIARY)
            assert (A2 - plain.layers[key].A2).abs().max() <= 1e-10
            assert (B2 - plain.layers[key].B2).abs().max() <= 1e-10


@pytest.mark.parametrize(("name", "own"), [*((name, {}) for name in METHODS), *ASCENTS])
def test_a_step_costs_what_is_declared(name, own):
    model, batch = model_of(name, "mlp")
    optimizer = build_method(name, model, **settings(name, max_grad_norm=1.0, **own))
    optimizer.total_steps = STEPS
    batch = {key: tensor[:8] for key, tensor in batch.items()}
    rows = {"forward": 0, "backward": 0}

    def count(of, output):
        rows[of] += len(output.logits)
        return output

    def loss_of(output, _):
        output.loss.requires_grad and output.loss.register_hook(lambda _: count("backward", output) and None)
        return output.loss

    model.register_forward_hook(lambda _, inputs, output: count("forward", output))
    closure = closure_of(model.train(), optimizer, batch, loss_of)
    steps = 2 * SETTINGS["looksam_every"]
    for _ in range(steps):
        optimizer.step(closure)
    declared = optimizer.passes_per_step * steps * 8
    assert rows == {"forward": declared + optimizer.forward_passes_per_step * steps * 8, "backward": declared}


@pytest.mark.parametrize("name", ["lora-sam", "looksam", "esam", "flat-lora", "rwp"])
def test_what_needs_a_closure_says_so(name):
    model, _ = primary_model("mlp")
    with pytest.raises(TypeError, match="closure"):
        build_method(name, model, **settings(name, max_grad_norm=1.0)).step()


def test_the_factors_are_where_they_were_if_the_second_pass_fails():
    model, batch = primary_model("mlp")
    optimizer = build_method("lora-sam", model.train(), **settings("lora-sam", max_grad_norm=1.0))
    closure = closure_of(model, optimizer, batch)
    optimizer.step(closure)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return closure()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


@pytest.mark.parametrize("lacking", [(0,), (1,), (2,), (0, 1), (3,)])
def test_looksam_goes_on_where_a_gradient_comes_and_goes_as_of_an_expert_without_tokens(lacking):
    model, batch = primary_model("mlp")
    optimizer = build_method("looksam", model.train(), **settings("looksam", max_grad_norm=1.0, looksam_every=2))
    closure = closure_of(model, optimizer, batch)
    expert = optimizer.param_groups[0]["params"][0]
    calls = []

    def sometimes():  # two passes, one, two, one
        loss = closure()
        if len(calls) in lacking:
            expert.grad = None
        calls.append(1)
        return loss

    for _ in range(4):
        optimizer.step(sometimes)
    assert len(calls) == 6
    assert all(parameter.isfinite().all() for parameter in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("name", ["lora-sam", "looksam", "nbar", "obar"])
def test_a_frozen_factor_is_refused_in_words(name):
    model, _ = primary_model("mlp")
    next(layer for layer in adapted(model).values()).lora_A[PRIMARY].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        build_method(name, model, **settings(name, max_grad_norm=1.0))
