"""Noise on weights: what it is, when it is there, and that no weight is another for it."""

import copy
import pickle

import pytest
import torch
from tiny import closure_of, primary_model, randomize
from transformers.pytorch_utils import Conv1D

from bilora_ray.method import build_method, settings_of
from bilora_ray.method.layers import PRIMARY
from bilora_ray.method.noise import SPARE, Draws, NoisyLayer

SETTINGS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "rho": 0.2,
    "rwp_space": "weight",
    "seed": 3,
}
NOISY = [("flat-lora", {}), ("rwp", {}), ("rwp", {"rwp_space": "lora"})]


def noisy(family, name="rwp", dtype=torch.float32, **own):
    """A model in training whose B1 is random, its optimizer, and a batch."""
    model, batch = primary_model(family, dtype)
    randomize(model)
    optimizer = build_method(name, model, **{key: {**SETTINGS, **own}[key] for key in settings_of(name)})
    optimizer.total_steps = 10
    optimizer.param_groups[0]["begun"] = 4  # Flat-LoRA has none at the first step
    return model.train(), optimizer, batch


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, NoisyLayer)]


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses_in_a_step(model, optimizer, batch, passes):
    """Of the step, if a pass changes nothing: the learning rate is 0."""
    losses = []
    optimizer.param_groups[0]["lr"] = 0.0

    def closure():
        for _ in range(passes):
            losses.append(float(closure_of(model, optimizer, batch)().detach()))
        return torch.tensor(losses[0])

    optimizer.step(closure)
    return losses


@pytest.mark.parametrize(("name", "own"), NOISY)
def test_all_passes_of_a_step_have_its_noise_and_the_next_step_has_another(name, own):
    model, optimizer, batch = noisy("mlp", name, **own)
    plain = float(model(**batch).loss.detach())
    first = losses_in_a_step(model, optimizer, batch, 3)
    second = losses_in_a_step(model, optimizer, batch, 3)
    assert len({*first}) == len({*second}) == 1
    assert len({plain, first[0], second[0]}) == 3
    assert float(model(**batch).loss.detach()) == plain


@pytest.mark.parametrize(("name", "own"), NOISY)
def test_after_a_step_and_after_one_that_fails_no_weight_is_another(name, own):
    model, optimizer, batch = noisy("llama", name, **own)
    before, plain = weights_of(model), float(model(**batch).loss.detach())

    def fails():
        closure_of(model, optimizer, batch)()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    assert all(torch.equal(before[key], value) for key, value in weights_of(model).items())
    assert float(model(**batch).loss.detach()) == plain
    assert optimizer.param_groups[0]["begun"] == 4
    optimizer.step(closure_of(model, optimizer, batch))
    changed = [key for key, value in weights_of(model).items() if not torch.equal(before[key], value)]
    assert changed == [key for key in before if "lora_" in key]


@pytest.mark.parametrize("name", ["flat-lora", "rwp"])
def test_an_evaluation_amid_a_step_does_not_see_it(name):
    model, optimizer, batch = noisy("mlp", name)
    plain = model.eval()(**batch).logits
    seen = []

    def closure():
        seen.append(model.eval()(**batch).logits)
        model.train()
        return closure_of(model, optimizer, batch)()

    optimizer.step(closure)
    assert torch.equal(seen[0], plain)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_layer_computes_with_the_sum_and_so_does_its_gradient(family):
    model, optimizer, _ = noisy(family, dtype=torch.float64)
    for layer in layers_of(model):
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
        A, B, s = layer.factors(PRIMARY)
        merged = layer.weight_in_rows + s * B @ A
        with optimizer._noise.at(0, 0.2):
            scale, noise = layer.noise.scale, layer.noise.draws * layer.noise.scale
            found = layer(x)
            g = torch.randn_like(found)
            (of_x,) = torch.autograd.grad(found, x, g)
        expected = torch.nn.functional.linear(x, merged + noise, layer.base_layer.bias)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(of_x, g @ (merged + noise), rtol=1e-10, atol=1e-10)
        sizes = 0.2 * merged.norm(dim=1, keepdim=True) / merged.shape[1] ** 0.5
        torch.testing.assert_close(scale.abs(), sizes, rtol=1e-10, atol=0)
    assert family != "gpt2" or any(isinstance(layer.base_layer, Conv1D) for layer in layers_of(model))


def test_on_a_bf16_base_rows_move_by_their_share():
    model, optimizer, batch = noisy("llama", dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layer = layers_of(model)[0]
    A, B, s = layer.factors(PRIMARY)
    norms = (layer.weight_in_rows.float() + s * B @ A).norm(dim=1)
    with optimizer._noise.at(0, 0.2):
        assert layer.noise.draws.dtype == torch.bfloat16
        sizes = layer.noise.scale.float().abs().flatten() * layer.in_features**0.5
    torch.testing.assert_close(sizes, 0.2 * norms, rtol=0.02, atol=0)
    losses = [float(optimizer.step(closure_of(model, optimizer, batch)).detach()) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_numbers_are_standard_normal_and_those_of_rows_layers_and_steps_uncorrelated():
    draws, like = Draws(0), [torch.empty(4, 64), torch.empty(6, 64)]
    ones = [torch.ones(4), torch.ones(6)]
    found = []
    for step in range(400):
        noises = draws.at(step, ones, like)
        found.append(torch.cat([noise.draws * noise.scale for noise in noises]).flatten())
    numbers = torch.stack(found).double()
    count = numbers.numel()
    assert abs(float(numbers.mean())) < 4 / count**0.5
    assert abs(float(numbers.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(numbers.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    # Over the steps, of each two numbers; and over the numbers, of each two steps.
    for pairs, of in (
        (numbers.T @ numbers / len(numbers), len(numbers)),
        (numbers @ numbers.T / len(numbers.T), len(numbers.T)),
    ):
        apart = pairs - torch.diag(pairs.diag())
        assert float(apart.abs().max()) < 6.5 / of**0.5


def test_they_are_a_function_of_seed_step_and_layer():
    like, ones = [torch.empty(8, 32)] * 2, [torch.ones(8)] * 2

    def numbers(seed, step):
        return [noise.draws * noise.scale for noise in Draws(seed).at(step, ones, like)]

    one, again = numbers(1, 7), numbers(1, 7)
    assert all(map(torch.equal, one, again))
    assert not torch.equal(*one)
    assert not torch.equal(one[0], numbers(1, 8)[0])
    assert not torch.equal(one[0], numbers(2, 7)[0])


def test_there_is_no_copy_of_the_weights():
    model, optimizer, batch = noisy("llama")
    optimizer.step(closure_of(model, optimizer, batch))
    assert sum(table.numel() for table in optimizer._noise._draws._tables.values()) == SPARE + 48 * 32
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {table.untyped_storage().data_ptr() for table in optimizer._noise._draws._tables.values()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        optimizer.step(closure_of(model, optimizer, batch))
    weights = {tuple(layer.weight_in_rows.shape) for layer in layers_of(model)}
    assert kept
    assert not weights & set(kept)


def test_gradient_checkpointing_sees_the_same_noise():
    ends = []
    for checkpointing in (False, True):
        model, optimizer, batch = noisy("llama", "flat-lora")
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer, batch))
        ends.append(weights_of(model))
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


def test_a_noisy_layer_can_be_copied_and_pickled():
    model, _, batch = noisy("mlp")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 # its own
        assert len(layers_of(other)) == len(layers_of(model)) == 3
        assert torch.equal(other(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["flat-lora", "rwp"])
def test_what_has_no_plain_weight_is_refused(name):
    settings = {key: SETTINGS[key] for key in settings_of(name)}
    model, _ = primary_model("mlp", use_dora=True)
    with pytest.raises(ValueError, match=r"plain linear.* not to first, second, head"):
        build_method(name, model, **settings)
    model, _ = primary_model("llama", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"not to .*embed_tokens"):
        build_method(name, model, **settings)


def test_flat_loras_noise_needs_to_know_how_long_the_training_is():
    model, optimizer, batch = noisy("mlp", "flat-lora")
    optimizer.total_steps = None
    with pytest.raises(RuntimeError, match="set total_steps"):
        optimizer.step(closure_of(model, optimizer, batch))
