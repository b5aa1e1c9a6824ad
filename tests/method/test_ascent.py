"""The auxiliary that is made anew in each step: its norm, what it survives, and what it is made of."""

import pytest
import torch
from test_optimizer import of, parameters_of, train
from test_reference import adapted
from tiny import bilora_model, closure_of, primary_model, randomize

from bilora_ray.method import BiLoraAdamW, auxiliary_factors, auxiliary_parameters, build_method, sides
from bilora_ray.method.layers import AUXILIARY, PRIMARY
from bilora_ray.method.reference_ascent import basis, of_norm_1

RULES = ["tangent", "half-step"]


def optimizer_of(model, rule, **own):
    return BiLoraAdamW(model, **{"learning_rate": 1e-3, "rho": 0.05, "ascent": rule, **own})


def products(model):
    return [s2 * B.detach() @ A.detach() for A, B, s2 in auxiliary_factors(model)]


def assert_same(ours, theirs):
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "mlp"])
def test_the_norm_is_rho_after_every_step(family, rule):
    model, batch = bilora_model(family)
    optimizer = optimizer_of(model, rule)
    for _ in range(6):
        optimizer.step(closure_of(model, optimizer, batch))
        assert float(optimizer.auxiliary_norm) == pytest.approx(0.05, rel=1e-5)
    assert not any(parameter in optimizer.state for parameter in auxiliary_parameters(model).values())


@pytest.mark.parametrize("rule", RULES)
def test_the_norm_may_leave_the_scaling_out(rule):
    model, batch = bilora_model("llama", alpha_pattern={"q_proj": 3})
    optimizer = optimizer_of(model, rule, norm="unscaled")
    train(model, optimizer, batch, 3)
    squares = [(B @ A).square().sum() for A, B, _ in auxiliary_factors(model)]
    assert float(torch.stack(squares).sum().sqrt().detach()) == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_it_is_up_the_loss(rule):
    model, batch = bilora_model("llama", dtype=torch.float64)
    optimizer = optimizer_of(model, rule, learning_rate=1e-12)
    losses = train(model, optimizer, batch, 4)
    assert losses[1] > losses[0]
    optimizer.param_groups[1]["rho"] = 1e-9
    assert abs(train(model, optimizer, batch, 2)[1] - losses[0]) < 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_without_a_gradient_that_is_a_number_the_perturbation_stays(rule, bad):
    model, batch = bilora_model("llama")
    optimizer = optimizer_of(model, rule)
    train(model, optimizer, batch, 2)
    before = products(model)
    closure_of(model, optimizer, batch)()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(0.0)
    if bad:
        optimizer.param_groups[1]["params"][4].grad[0, 0] = bad
        optimizer.param_groups[1]["params"][5].grad[0, 0] = bad
    optimizer.step()
    assert_same(products(model), before)
    assert train(model, optimizer, batch, 2)[1] > 0


@pytest.mark.parametrize("rule", RULES)
def test_from_nothing_no_gradient_makes_nothing(rule):
    model, batch = bilora_model("mlp")
    optimizer = optimizer_of(model, rule)
    closure_of(model, optimizer, batch)()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.zero_()
    optimizer.step()
    assert float(optimizer.auxiliary_norm) == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_of_low_rank_takes_no_direction_away(rule):
    model, batch = bilora_model("mlp", rank=4)
    optimizer = optimizer_of(model, rule)
    train(model, optimizer, batch, 3)
    one = {key: tensor[:1] for key, tensor in batch.items()}  # every G has rank 1
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer, one))
        assert float(optimizer.auxiliary_norm) == pytest.approx(0.05, rel=1e-4)
    train(model, optimizer, batch, 4)
    ranks = [int(torch.linalg.matrix_rank(product, rtol=1e-5)) for product in products(model)]
    assert ranks == [4, 4, 4]


@pytest.mark.parametrize("scale", [1e-8, 1e4])
@pytest.mark.parametrize("rule", RULES)
def test_how_long_gradients_are_takes_no_direction_away(rule, scale):
    model, batch = bilora_model("mlp", rank=4, dtype=torch.float64)
    optimizer = optimizer_of(model, rule)
    one = {key: tensor[:1] for key, tensor in batch.items()}
    for step in range(9):
        inputs = one if 3 <= step < 7 else batch
        optimizer.step(closure_of(model, optimizer, inputs, lambda output, _: scale * output.loss))
    assert [int(torch.linalg.matrix_rank(product, rtol=1e-5)) for product in products(model)] == [4, 4, 4]


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_without_a_gradient_has_no_perturbation_and_can_get_one_again(rule):
    model, batch = bilora_model("mlp")
    optimizer = optimizer_of(model, rule)
    absent = next(iter(adapted(model).values()))
    own = [absent.lora_A[PRIMARY], absent.lora_B[PRIMARY], absent.lora_A[AUXILIARY], absent.lora_B[AUXILIARY]]
    for step in range(6):
        closure_of(model, optimizer, batch)()
        if step in (0, 3):
            for factor in own:
                factor.weight.grad = None
        optimizer.step()
        assert float(optimizer.auxiliary_norm) == pytest.approx(0.05, rel=1e-5)
        # P_B G is 0 in the second step, where B2 still is.
        assert (products(model)[0].norm() == 0) == (step in (0, 3) or (rule == "half-step" and step == 1))


def test_the_tangent_rule_reads_the_auxiliarys_spans_alone_where_the_primary_sees_other_inputs():
    model, batch = bilora_model("mlp", dtype=torch.float64, lora_dropout=0.5)
    randomize(model)
    optimizer = optimizer_of(model, "tangent", rho=1.0)
    layers = list(adapted(model).values())
    found = []
    torch.manual_seed(3)
    closure_of(model, optimizer, batch)()
    for layer in layers:
        A, B, s2 = layer.factors(AUXILIARY)
        U_A, U_B = basis(of_norm_1(A.detach()).T), basis(of_norm_1(B.detach()))
        to_A, from_B = B.grad / s2, A.grad / s2
        G_A = to_A @ torch.linalg.pinv(A.detach() @ A.detach().T) @ A.detach()  # G P_A
        B_G = B.detach() @ torch.linalg.pinv(B.detach().T @ B.detach()) @ from_B  # P_B G
        T = B_G + G_A - U_B @ U_B.T @ G_A
        U, S, V = torch.linalg.svd(T)
        assert U_A.shape[1] == 3
        found.append(U[:, :3] * S[:3] @ V[:3])
    total = torch.stack([T.square().sum() for T in found]).sum().sqrt()
    optimizer.step()
    for product, T in zip(products(model), found, strict=True):
        torch.testing.assert_close(product, T / total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_it_does_not_matter_how_many_layers_are_computed_at_once(rule, monkeypatch):
    paths = []
    for most in (2**24, 1):
        monkeypatch.setattr(sides, "MOST", most)
        model, batch = bilora_model("llama", dtype=torch.float64)
        paths.append(train(model, optimizer_of(model, rule), batch, 8))
    assert paths[0] == pytest.approx(paths[1], rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_saved_states_continue_exactly(rule, tmp_path):
    model, batch = bilora_model("llama")
    optimizer = optimizer_of(model, rule)
    train(model, optimizer, batch, 3)
    torch.save({"model": parameters_of(model), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    expected = train(model, optimizer, batch, 4)
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed, batch = bilora_model("llama")
    resumed.load_state_dict(saved["model"], strict=False)
    optimizer = optimizer_of(resumed, rule)
    optimizer.load_state_dict(saved["optimizer"])
    assert train(resumed, optimizer, batch, 4) == expected
    assert_same(parameters_of(resumed).values(), parameters_of(model).values())


@pytest.mark.parametrize(("before", "now"), [(0.0, 0.5), (0.5, 0.0)])
def test_whose_gradients_are_of_one_g_is_not_what_a_saved_state_says(before, now):
    saved, _ = bilora_model("mlp", lora_dropout=before)
    model, _ = bilora_model("mlp", lora_dropout=now)
    optimizer = optimizer_of(model, "tangent")
    optimizer.load_state_dict(optimizer_of(saved, "tangent").state_dict())
    assert [one is None for one in optimizer.param_groups[1]["partners"]] == [now > 0] * 3


@pytest.mark.parametrize("rule", RULES)
def test_a_base_in_bf16_and_an_autocast_around_it_change_neither_norm_nor_dtype(rule):
    model, batch = bilora_model("llama", dtype=torch.bfloat16)
    optimizer = optimizer_of(model, rule)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, optimizer, batch, 4)
    assert {factor.dtype for layer in auxiliary_factors(model) for factor in layer[:2]} == {torch.float32}
    assert float(optimizer.auxiliary_norm) == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_what_it_does_not_read_is_refused(rule):
    model, _ = bilora_model("mlp")
    for own in ({"clip": "none"}, {"clip": "per-layer"}, {"auxiliary_learning_rate": 1e-3}):
        with pytest.raises(ValueError, match=rule):
            optimizer_of(model, rule, **own)


def test_a_frozen_factor_is_refused_in_words():
    model, _ = primary_model("mlp")
    next(iter(adapted(model).values())).lora_A[PRIMARY].weight.requires_grad_(False)
    settings = {**of("bilora"), "ascent": "tangent", "auxiliary_learning_rate": None}
    with pytest.raises(ValueError, match="frozen"):
        build_method("bilora", model, **settings)
