"""Sharpness against brute force: the weights written down and moved, and the whole Hessian."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import Batch, Mlp, bilora_model, primary_model, randomize
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilora_ray.method.adapters import fuse, primary_factors
from bilora_ray.method.sharpness import adversarial_rises, m_sharpness, random_rises, top_eigenvalue
from bilora_ray.method.spaces import FullSpace, LoraSpace, Pass, Space, norm

RADII = (0.05, 0.2, 1.0)
SPACES = (FullSpace, LoraSpace)
LAYERS = ("first", "second", "head")


def adapted(family: str = "mlp", dtype: torch.dtype = torch.float64, **config: object) -> tuple[PeftModel, Batch]:
    model, batch = primary_model(family, dtype, **config)
    randomize(model)
    return model, batch


def parts(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    split = {key: value.split(list(sizes)) for key, value in batch.items()}
    return [{key: value[place] for key, value in split.items()} for place in range(len(sizes))]


def passes(model: nn.Module, batch: Batch, *sizes: int) -> list[Pass]:
    """The rows of a batch, in passes of so many."""
    rows = len(next(iter(batch.values())))
    cut = parts(batch, sizes or [rows])
    counts = [len(next(iter(one.values()))) for one in cut]
    return [Pass(lambda one=one: model(**one).loss, n, n) for one, n in zip(cut, counts, strict=True)]  # type: ignore[misc]


class Brute:
    """The MLP with its merged weights, or its factors, as one long vector that the loss is a function of."""

    def __init__(self, model: PeftModel, batch: Batch, space: type[Space]) -> None:
        self.batch = batch
        self.space = space
        self.plain = Mlp().double()
        base = model.get_base_model()
        self.weights = {name: getattr(base, name).base_layer.weight.detach() for name in LAYERS}
        self.biases = {f"{name}.bias": getattr(base, name).base_layer.bias for name in ("first", "head")}
        self.factors = primary_factors(model)
        if space is FullSpace:
            scaled = (s * (B @ A).detach() for A, B, s in self.factors)
            self.parts = [W + change for W, change in zip(self.weights.values(), scaled, strict=True)]
        else:
            self.parts = [part.detach() for layer in self.factors for part in layer[:2]]
        self.point = torch.cat([part.flatten() for part in self.parts])

    def loss(self, point: Tensor) -> Tensor:
        split = point.split([part.numel() for part in self.parts])
        found = [one.view_as(part) for one, part in zip(split, self.parts, strict=True)]
        if self.space is LoraSpace:
            pairs = zip(found[::2], found[1::2], self.factors, self.weights.values(), strict=True)
            found = [W + layer.scaling * B @ A for A, B, layer, W in pairs]
        named = {f"{name}.weight": part for name, part in zip(LAYERS, found, strict=True)}
        output = functional_call(self.plain, {**named, **self.biases}, kwargs=self.batch)
        return output.loss  # type: ignore[no-any-return]

    def rise(self, direction: Tensor, radius: float) -> float:
        return (self.loss(self.point + radius * direction) - self.loss(self.point)).item()

    def adversarial(self) -> list[float]:
        gradient = torch.func.grad(self.loss)(self.point)
        return [self.rise(gradient / gradient.norm(), radius) for radius in RADII]

    def hessian(self) -> Tensor:
        return torch.func.hessian(self.loss)(self.point)


def flat(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in vector])


@pytest.mark.parametrize("kind", SPACES)
def test_it_agrees_with_brute_force_and_the_exact_hessian(kind: type[Space]) -> None:
    model, batch = adapted()
    space, rows, brute = kind(model), passes(model, batch, 4, 3, 2), Brute(model, batch, kind)
    hessian = brute.hessian().detach()
    torch.testing.assert_close(adversarial_rises(space, rows, RADII), brute.adversarial(), rtol=1e-9, atol=0)
    torch.testing.assert_close(flat(space.gradient(rows)), torch.func.grad(brute.loss)(brute.point), rtol=1e-9, atol=0)
    vector = space.normal(torch.Generator().manual_seed(1))
    torch.testing.assert_close(flat(space.product(rows, vector)), hessian @ flat(vector), rtol=1e-9, atol=1e-12)
    found = top_eigenvalue(space, rows, products=100, tolerance=1e-6)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-4)
    # A few products say less, and how much less.
    early = top_eigenvalue(space, rows, products=6)
    assert early.products == 6
    assert (torch.linalg.eigvalsh(hessian) - early.value).abs().min().item() <= early.error
    assert early.error > 1e-6 * early.value


@pytest.mark.parametrize("kind", SPACES)
def test_random_directions_are_as_long_as_the_filters(kind: type[Space]) -> None:
    model, batch = adapted()
    space, brute = kind(model), Brute(model, batch, kind)
    found = random_rises(space, passes(model, batch, 5, 4), RADII, directions=3, seed=7)
    generator = torch.Generator().manual_seed(7)
    for rises in found:
        direction = [
            one / one.norm(dim=1, keepdim=True) * part.norm(dim=1, keepdim=True)
            for one, part in zip(space.normal(generator), brute.parts, strict=True)
        ]
        torch.testing.assert_close(rises, [brute.rise(flat(direction), radius) for radius in RADII], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SPACES)
def test_m_sharpness_is_the_mean_of_each_batch_by_itself_by_its_rows(kind: type[Space]) -> None:
    model, batch = adapted()
    batches = [passes(model, one, *sizes) for one, sizes in zip(parts(batch, (7, 2)), ((4, 3), (2,)), strict=True)]
    alone = [Brute(model, one, kind).adversarial() for one in parts(batch, (7, 2))]
    expected = [(7 * whole + 2 * rest) / 9 for whole, rest in zip(*alone, strict=True)]
    torch.testing.assert_close(m_sharpness(kind(model), batches, RADII), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", SPACES)
def test_how_rows_are_cut_into_passes_changes_nothing(kind: type[Space]) -> None:
    model, batch = adapted()
    space = kind(model)
    measured = []
    for sizes in ((9,), (1,) * 9, (2, 6, 1)):
        rows = passes(model, batch, *sizes)
        top = top_eigenvalue(space, rows, products=30, tolerance=1e-6)
        measured.append([*adversarial_rises(space, rows, RADII), *random_rises(space, rows, RADII, 1)[0], top.value])
    torch.testing.assert_close(measured[1:], measured[:1] * 2, rtol=1e-6, atol=0)


class Quadratic(nn.Module):
    """||X W^T - Y||^2 / 2, whose Hessian by W is X^T X, once for each row of W."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.only = nn.Linear(x.shape[1], y.shape[1], bias=False)
        self.x, self.y = x, y

    def forward(self) -> Tensor:
        return (self.only(self.x) - self.y).square().sum() / 2


def planted(scaling: float = 1.0) -> tuple[PeftModel, Tensor]:
    """A quadratic that is flat but for known curvatures, with an adapter of full rank: A1 orthogonal, B1 = 0."""
    torch.manual_seed(0)
    curvatures = torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    base = Quadratic(curvatures.sqrt()[:, None] * turn, torch.randn(4, 3, dtype=torch.float64)).double()
    lora = LoraConfig(r=4, lora_alpha=4 * scaling, target_modules=["only"])  # type: ignore[arg-type]
    model = get_peft_model(base, lora)  # type: ignore[arg-type]
    nn.init.orthogonal_(primary_factors(model)[0].A)
    return model, curvatures


def test_a_pass_whose_rows_are_not_told_is_none() -> None:
    # It would count for as much as any other in a mean over batches.
    assert inspect.signature(Pass).parameters["rows"].default is inspect.Parameter.empty


def test_a_planted_quadratic_is_found() -> None:
    model, curvatures = planted()
    space, rows = FullSpace(model), [Pass(model, 1, 1)]
    found = top_eigenvalue(space, rows, tolerance=1e-9)
    assert found.value == pytest.approx(curvatures.max().item(), rel=1e-8)
    assert found.products <= 5  # there are four different eigenvalues
    gradient = space.gradient(rows)
    steepness = norm(gradient)
    curved = flat(gradient) @ flat(space.product(rows, gradient)) / steepness**2
    expected = [a * steepness + a * a / 2 * curved.item() for a in RADII]
    assert adversarial_rises(space, rows, RADII) == pytest.approx(expected, rel=1e-9)


def test_both_spaces_agree_where_an_adapter_reaches_all_of_the_weights() -> None:
    model, _ = planted()
    full, lora, rows = FullSpace(model), LoraSpace(model), [Pass(model, 1, 1)]
    assert adversarial_rises(lora, rows, RADII) == pytest.approx(adversarial_rises(full, rows, RADII), rel=1e-9)
    # Of a scaled adapter a step moves the weights by as much more.
    twice, _ = planted(scaling=2.0)
    half, rows = [radius / 2 for radius in RADII], [Pass(twice, 1, 1)]
    found = adversarial_rises(LoraSpace(twice), rows, half)
    assert found == pytest.approx(adversarial_rises(FullSpace(twice), rows, RADII), rel=1e-9)


def test_where_there_is_no_gradient_there_is_no_rise() -> None:
    model, _ = planted()
    flatness = [Pass(lambda: model() * 0.0, 1, 1)]
    assert adversarial_rises(FullSpace(model), flatness, RADII) == [0.0, 0.0, 0.0]
    assert top_eigenvalue(FullSpace(model), flatness).value == 0.0


MEASURES: dict[str, Callable[[Space, list[Pass]], object]] = {
    "adversarial": lambda space, rows: adversarial_rises(space, rows, RADII),
    "m": lambda space, rows: m_sharpness(space, [rows], RADII),
    "random": lambda space, rows: random_rises(space, rows, RADII, 2),
    "eigenvalue": lambda space, rows: top_eigenvalue(space, rows, products=3),
}


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_the_model_is_what_it_was_however_it_ends(
    kind: type[Space], measure: str, error: type[BaseException] | None
) -> None:
    model, batch = adapted("mlp", torch.float32)
    model.train()
    model.get_base_model().second.eval()  # type: ignore[operator,union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    modes, output = [module.training for module in model.modules()], model(**batch).logits.detach()
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        found: Tensor = model(**batch).loss
        if error is not None and calls == 4:
            raise error
        return found

    with nullcontext() if error is None else pytest.raises(error):
        MEASURES[measure](kind(model), [Pass(loss, 1, 1), Pass(loss, 1, 1)])
    assert calls >= 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == flags
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model(**batch).logits, output)
    assert torch.is_grad_enabled()


def test_an_auxiliary_takes_no_part() -> None:
    model, batch = bilora_model("mlp", dtype=torch.float64)
    randomize(model)
    plain, _ = adapted()
    expected = adversarial_rises(FullSpace(plain), passes(plain, batch), RADII)
    assert adversarial_rises(FullSpace(model), passes(model, batch), RADII) != expected  # another primary was drawn
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".auxiliary." not in key})
    expected = adversarial_rises(FullSpace(plain), passes(plain, batch), RADII)
    assert adversarial_rises(FullSpace(model), passes(model, batch), RADII) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", SPACES)
def test_real_models_agree_with_autograd_over_whole_weights(family: str, kind: type[Space]) -> None:
    model, batch = adapted(family)
    space, rows = kind(model), passes(model, batch)
    if kind is FullSpace:
        bases = [layer.get_base_layer().weight for layer in space.layers]
        turned = [getattr(layer, "fan_in_fan_out", False) for layer in space.layers]
        weights = [base.requires_grad_() for base in bases]
    else:
        weights = [part for layer in primary_factors(model) for part in layer[:2]]
        turned = [False] * len(weights)
    model.eval()
    vector = space.normal(torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(rows[0].loss(), weights, create_graph=True)
        pairs = zip(gradient, vector, turned, strict=True)
        slope = sum((one * (part.T if is_turned else part)).sum() for one, part, is_turned in pairs)
        product = torch.autograd.grad(slope, weights)  # type: ignore[arg-type]
    for found, expected in ((space.gradient(rows), gradient), (space.product(rows, vector), product)):
        one = flat([part.T if is_turned else part for part, is_turned in zip(expected, turned, strict=True)])
        # Parts of these models compute in fp32 whatever their weights are in.
        assert (flat(found) - one).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("kind", SPACES)
def test_low_precision_rounds_a_displacement_with_the_sum(kind: type[Space]) -> None:
    exact, batch = adapted("llama", torch.float32)
    low, _ = adapted("llama", torch.bfloat16)
    low.load_state_dict(exact.state_dict())
    # The weights that bf16 keeps are those of both.
    exact.load_state_dict(low.state_dict())
    wanted = adversarial_rises(kind(exact), passes(exact, batch), RADII)
    found = adversarial_rises(kind(fuse(low)), passes(low, batch), RADII)
    assert found == pytest.approx(wanted, rel=0, abs=2e-3)  # of a loss of 3.7


@pytest.mark.parametrize("kind", SPACES)
def test_what_cannot_be_measured_is_told(kind: type[Space]) -> None:
    with pytest.raises(ValueError, match="no adapter"):
        kind(Mlp())
    model, _ = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        kind(model)


def test_the_factors_of_a_dora_are_not_guessed_and_its_filters_are_its_magnitudes() -> None:
    model, batch = adapted(use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        LoraSpace(model)
    space = FullSpace(model)
    for layer in space.layers:
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    norms = list(space.filter_norms())
    model.merge_adapter()
    for layer, found in zip(space.layers, norms, strict=True):
        weight = layer.get_base_layer().weight
        weight = weight.T if layer.fan_in_fan_out else weight
        torch.testing.assert_close(found, weight.norm(dim=1, keepdim=True), rtol=1e-6, atol=0)
    model.unmerge_adapter()
    assert len(random_rises(space, passes(model, batch), RADII, 1)[0]) == len(RADII)
    (rise,) = adversarial_rises(space, passes(model, batch), RADII[:1])
    assert 0 < rise < math.inf
