"""The optimizers' contract: the closure, the schedule, saved states, and what they refuse."""

import pytest
import torch
from tiny import bilora_model, closure_of, model_of, primary_model
from transformers import get_scheduler

from bilora_ray.method import (
    METHODS,
    BiLoraAdamW,
    LoraAdamW,
    auxiliary_parameters,
    build_method,
    has_auxiliary,
    primary_parameters,
    settings_of,
)

SETTINGS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "rho": 0.05,
    "auxiliary_rank": 3,
    "auxiliary_learning_rate": 2e-3,
    "clip": "global",
    "norm": "effective",
    "ascent": "adamw",
    "looksam_every": 3,
    "looksam_alpha": 0.7,
    "bar_alpha": 0.25,
    "esam_beta": 0.5,
    "esam_gamma": 0.5,
    "rwp_space": "weight",
    "seed": 0,
}


def of(name):
    return {key: SETTINGS[key] for key in settings_of(name)}


def train(model, optimizer, batch, steps):
    return [float(optimizer.step(closure_of(model.train(), optimizer, batch)).detach()) for _ in range(steps)]


def parameters_of(model):
    named = primary_parameters(model) | auxiliary_parameters(model)
    return {name: parameter.detach().clone() for name, parameter in named.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_through_the_same_seam(name):
    model, batch = model_of(name, "llama")
    optimizer = build_method(name, model, **of(name))
    optimizer.total_steps = 15
    assert has_auxiliary(model) == ("auxiliary_rank" in settings_of(name))
    losses = train(model, optimizer, batch, 15)
    assert losses[-1] < losses[0]


def test_settings_reach_the_groups():
    model, _ = primary_model("llama")
    descent, ascent = build_method("bilora", model, **of("bilora")).param_groups
    assert (descent["lr"], descent["weight_decay"], descent["maximize"]) == (1e-3, 0.1, False)
    assert (ascent["lr"], ascent["weight_decay"], ascent["maximize"], ascent["rho"]) == (2e-3, 0.0, True, 0.05)
    assert descent["max_grad_norm"] == ascent["max_grad_norm"] == 1.0
    assert {tuple(p.shape) for p in ascent["params"]} == {tuple(p.shape) for p in auxiliary_parameters(model).values()}


def test_the_auxiliary_learning_rate_is_the_primarys_when_absent():
    model, _ = bilora_model("llama")
    assert BiLoraAdamW(model, learning_rate=3e-4, rho=0.05).param_groups[1]["lr"] == 3e-4


def test_plain_lora_is_torchs_adamw_with_a_gradient_limit():
    ours, batch = primary_model("llama")
    train(ours, LoraAdamW(ours, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5), batch, 10)
    theirs, batch = primary_model("llama")
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    for _ in range(10):
        closure_of(theirs.train(), optimizer, batch)()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    for ours_, theirs_ in zip(primary_parameters(ours).values(), trained, strict=True):
        assert torch.equal(ours_, theirs_)


def test_a_step_without_a_closure_uses_the_gradients_that_are_there():
    with_closure, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(with_closure, learning_rate=1e-3, rho=0.05)
    assert optimizer.step(closure_of(with_closure, optimizer, batch)) is not None
    without, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(without, learning_rate=1e-3, rho=0.05)
    without(**batch).loss.backward()
    assert optimizer.step() is None
    ours, theirs = parameters_of(with_closure), parameters_of(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_schedule_drives_both_branches():
    model, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, auxiliary_learning_rate=4e-3)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    for step in range(1, 4):
        optimizer.step(closure_of(model, optimizer, batch))
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [1e-3 * (1 - step / 4), 4e-3 * (1 - step / 4)]
        )


def test_saved_states_continue_exactly(tmp_path):
    model, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05)
    train(model, optimizer, batch, 4)
    torch.save({"model": parameters_of(model), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    expected = train(model, optimizer, batch, 4)

    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed, batch = bilora_model("llama")
    resumed.load_state_dict(saved["model"], strict=False)
    # What the saved state holds wins over the constructor, as in torch.
    optimizer = BiLoraAdamW(resumed, learning_rate=1.0, rho=9.0)
    optimizer.load_state_dict(saved["optimizer"])
    assert train(resumed, optimizer, batch, 4) == expected
    ours, theirs = parameters_of(resumed), parameters_of(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_step_hooks_run_once_a_step():
    model, batch = bilora_model("llama")
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, batch, 2)
    assert calls == ["before", "after"] * 2


def test_the_auxiliary_norm_is_the_current_one():
    model, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, auxiliary_learning_rate=1e-2)
    assert optimizer.auxiliary_norm == 0
    train(model, optimizer, batch, 2)
    assert float(optimizer.auxiliary_norm) == pytest.approx(0.05, rel=1e-5)
    assert optimizer.metrics() == {"auxiliary_norm": float(optimizer.auxiliary_norm)}


def test_a_loss_in_evaluation_mode_is_refused():
    model, batch = bilora_model("llama")
    optimizer = BiLoraAdamW(model, learning_rate=1e-3, rho=0.05)
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        optimizer.step(closure_of(model.eval(), optimizer, batch))


def test_misuse_is_refused():
    plain, _ = primary_model("llama")
    with pytest.raises(ValueError, match="attach_auxiliary"):
        BiLoraAdamW(plain, learning_rate=1e-3, rho=0.05)
    model, _ = bilora_model("llama")
    with pytest.raises(ValueError, match="auxiliary"):
        LoraAdamW(model, learning_rate=1e-3)
    for rho in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rho"):
            BiLoraAdamW(model, learning_rate=1e-3, rho=rho)
    with pytest.raises(ValueError, match="max_grad_norm"):
        BiLoraAdamW(model, learning_rate=1e-3, rho=0.05, max_grad_norm=0.0)
    frozen, _ = primary_model("llama")
    with pytest.raises(ValueError, match="is_trainable"):
        LoraAdamW(frozen.requires_grad_(False), learning_rate=1e-3)
    with pytest.raises(ValueError, match="did you mean 'bilora'"):
        build_method("bi-lora", plain, **of("bilora"))
    with pytest.raises(TypeError, match="rhoo"):
        build_method("bilora", plain, **of("bilora"), rhoo=1.0)
    for name in METHODS:
        with pytest.raises(TypeError, match="weight_decay"):
            build_method(name, plain, learning_rate=1e-3)
