"""How adversarial a perturbation is, against brute force: the weights written down and moved, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from peft import PeftModel
from tiny import Batch, Mlp, bilora_model, closure_of, primary_model, randomize
from torch import Tensor
from torch.func import functional_call

from bilora_ray.method import attach_auxiliary, auxiliary_factors, build_method, has_auxiliary
from bilora_ray.method.adapters import primary_factors
from bilora_ray.method.adversary import (
    GRADIENTS,
    LOSSES,
    Batches,
    Perturb,
    adversity,
    of_auxiliary,
    of_factors,
    subspace_overlap,
)
from bilora_ray.method.radius import Factors
from bilora_ray.method.spaces import FullSpace, Pass

RHO = 0.3
LAYERS = ("first", "second", "head")
TOLD = {
    *("auxiliary_norm", "auxiliary_cosine", "captured_sharpness", "captured_sharpness_held_out", "subspace_overlap"),
    *("stale_cosine", "stale_captured_sharpness", "stale_captured_sharpness_held_out"),
}


def parts(batch: Batch, sizes: list[int]) -> list[Batch]:
    split = {key: value.split(sizes) for key, value in batch.items()}
    return [{key: value[place] for key, value in split.items()} for place in range(len(sizes))]


def rows_of(batch: Batch, seed: int) -> Batch:
    """Other rows of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in batch.items()}


class Case:
    """An MLP with adapters, and three batches; the next one comes in two passes of unequal size."""

    def __init__(self, auxiliary: bool = True, rank: int = 3) -> None:
        self.model, batch = (
            bilora_model("mlp", rank, torch.float64) if auxiliary else primary_model("mlp", torch.float64)
        )
        randomize(self.model)
        self.rows = [batch, rows_of(batch, 1), rows_of(batch, 2)]
        self.calls: list[bool] = []
        self.batches = Batches(
            [self.one(self.rows[0])], [self.one(part) for part in parts(self.rows[1], [5, 4])], [self.one(self.rows[2])]
        )
        self.space = FullSpace(self.model)

    def one(self, batch: Batch) -> Pass:
        def loss() -> Tensor:
            self.calls.append(torch.is_grad_enabled())
            found: Tensor = self.model(**batch).loss
            return found

        return Pass(loss, len(batch["x"]), len(batch["x"]))

    def asked(self, radius: float | None = RHO) -> Perturb:
        return of_auxiliary(self.space, radius)


class Brute:
    """The same with the merged weights written down."""

    def __init__(self, model: PeftModel) -> None:
        base, self.plain = model.get_base_model(), Mlp().double()
        layers = [getattr(base, name) for name in LAYERS]
        self.biases = {f"{name}.bias": getattr(base, name).base_layer.bias for name in ("first", "head")}
        self.weights = [
            layer.base_layer.weight.detach() + change
            for layer, change in zip(layers, dense(primary_factors(model)), strict=True)
        ]

    def loss(
        self, batch: Batch, change: Sequence[Tensor] | None = None, weights: Sequence[Tensor] | None = None
    ) -> Tensor:
        at = weights or self.weights
        moved = at if change is None else [W + D for W, D in zip(at, change, strict=True)]
        named = {f"{name}.weight": W for name, W in zip(LAYERS, moved, strict=True)}
        return functional_call(self.plain, {**named, **self.biases}, kwargs=batch).loss  # type: ignore[no-any-return]

    def gradient(self, batch: Batch) -> list[Tensor]:
        leaves = [W.clone().requires_grad_() for W in self.weights]
        return list(torch.autograd.grad(self.loss(batch, weights=leaves), leaves))

    def share(self, batch: Batch, change: Sequence[Tensor], radius: float) -> float:
        up = scaled(self.gradient(batch), radius)
        rest = self.loss(batch)
        return ((self.loss(batch, change) - rest) / (self.loss(batch, up) - rest)).item()

    def told(self, rows: Sequence[Batch], change: Sequence[Tensor], radius: float) -> dict[str, float]:
        """All but the overlap."""
        previous, following, held_out = rows
        stale, fresh = self.gradient(previous), self.gradient(following)
        by_stale = scaled(stale, radius)
        return {
            "auxiliary_norm": flat(change).norm().item(),
            "auxiliary_cosine": cosine(change, fresh),
            "stale_cosine": cosine(stale, fresh),
            "captured_sharpness": self.share(following, change, radius),
            "captured_sharpness_held_out": self.share(held_out, change, radius),
            "stale_captured_sharpness": self.share(following, by_stale, radius),
            "stale_captured_sharpness_held_out": self.share(held_out, by_stale, radius),
        }


def dense(factors: Sequence[Factors]) -> list[Tensor]:
    return [(scaling * B @ A).detach() for A, B, scaling in factors]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def scaled(tensors: Sequence[Tensor], length: float) -> list[Tensor]:
    norm = flat(tensors).norm()
    return [tensor * length / norm for tensor in tensors]


def cosine(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return torch.nn.functional.cosine_similarity(flat(ones), flat(others), dim=0).item()


def put_auxiliary(model: PeftModel, changes: Sequence[Tensor]) -> None:
    """Have s2 B2 A2 be the best approximation of each of `changes` that its rank allows."""
    for (A, B, scaling), change in zip(auxiliary_factors(model), changes, strict=True):
        U, S, V = torch.linalg.svd(change, full_matrices=False)
        rank = min(A.shape[0], len(S))
        A.data.zero_()
        B.data.zero_()
        A.data[:rank] = V[:rank]
        B.data[:, :rank] = U[:, :rank] * S[:rank] / scaling


def truncated(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    found = []
    for tensor in tensors:
        U, S, V = torch.linalg.svd(tensor, full_matrices=False)
        found.append(U[:, :rank] * S[:rank] @ V[:rank])
    return found


def angles(ones: Tensor, others: Tensor) -> float:
    """The mean squared cosine between the spans of the columns, by bases and singular values."""
    Q, P = torch.linalg.qr(ones)[0], torch.linalg.qr(others)[0]
    return torch.linalg.svdvals(Q.T @ P).square().mean().item()


@pytest.mark.parametrize("radius", [RHO, None])
def test_it_agrees_with_brute_force(radius: float | None) -> None:
    case = Case()
    brute, change = Brute(case.model), dense(auxiliary_factors(case.model))
    told = adversity(case.space, case.batches, case.asked(radius))
    wanted = brute.told(case.rows, change, flat(change).norm().item() if radius is None else radius)
    pairs = zip(auxiliary_factors(case.model), primary_factors(case.model), strict=True)
    spans = [angles(*both) for one, other in pairs for both in ((one.A.T, other.A.T), (one.B, other.B))]
    assert told == pytest.approx({**wanted, "subspace_overlap": sum(spans) / len(spans)}, rel=1e-6, abs=1e-9)
    assert told.keys() == TOLD


def test_lora_sam_s_is_of_the_factors_and_known_from_the_gradient_at_the_weight() -> None:
    case = Case(auxiliary=False)
    optimizer = build_method("lora-sam", case.model, rho=RHO, learning_rate=0.0, weight_decay=0.0, max_grad_norm=None)
    assert not has_auxiliary(case.model)
    at_W = [(layer.A.clone(), layer.B.clone()) for layer in primary_factors(case.model)]
    moved: list[tuple[Tensor, Tensor]] = []
    closure = closure_of(case.model.train(), optimizer, case.rows[1])

    def watched() -> Tensor:
        moved[:] = [(layer.A.detach().clone(), layer.B.detach().clone()) for layer in primary_factors(case.model)]
        return closure()

    optimizer.step(watched)  # the second pass is at what it perturbs with
    pairs = list(zip(moved, at_W, primary_factors(case.model), strict=True))
    change = [layer.scaling * (B_up @ A_up - B @ A).detach() for (A_up, B_up), (A, B), layer in pairs]
    radius, chosen = optimizer.next_perturbed()  # type: ignore[attr-defined]
    told = adversity(case.space, case.batches, of_factors(case.space, radius, chosen))
    wanted = Brute(case.model).told(case.rows, change, flat(change).norm().item())
    spans = [angles(*both) for (A_up, B_up), (A, B), _ in pairs for both in (((A_up - A).T, A.T), (B_up - B, B))]
    assert told == pytest.approx({**wanted, "subspace_overlap": sum(spans) / len(spans)}, rel=1e-6, abs=1e-9)
    assert told["captured_sharpness"] > 0.1


def test_factors_that_are_not_chosen_stay_where_they_are() -> None:
    case = Case(auxiliary=False)
    chosen = [True, False, False, False, True, True]
    gradient = case.space.gradient(case.batches.following)
    found = of_factors(case.space, RHO, chosen)(gradient).spans
    moved = [bool(tensor.any()) for layer in found for tensor in (layer.A, layer.B)]
    assert moved == chosen
    assert math.sqrt(sum(float(t.square().sum()) for one in found for t in one[:2])) == pytest.approx(RHO)


def test_the_whole_gradient_of_the_next_batch_captures_all() -> None:
    case = Case(rank=16)  # as many as any layer has
    put_auxiliary(case.model, scaled(Brute(case.model).gradient(case.rows[1]), RHO))
    told = adversity(case.space, case.batches, case.asked())
    assert told["captured_sharpness"] == pytest.approx(1, rel=1e-6)
    assert told["auxiliary_cosine"] == pytest.approx(1, rel=1e-6)
    assert told["auxiliary_norm"] == pytest.approx(RHO, rel=1e-6)


def test_the_best_of_a_rank_has_the_share_that_its_singular_values_say() -> None:
    case = Case()
    brute = Brute(case.model)
    gradient = brute.gradient(case.rows[1])
    best = scaled(truncated(gradient, 3), RHO)
    put_auxiliary(case.model, best)
    told = adversity(case.space, case.batches, case.asked())
    kept = math.sqrt(sum(float(torch.linalg.svdvals(part)[:3].square().sum()) for part in gradient))
    assert told["auxiliary_cosine"] == pytest.approx(kept / float(flat(gradient).norm()), rel=1e-6)
    assert told["captured_sharpness"] == pytest.approx(brute.share(case.rows[1], best, RHO), rel=1e-6)
    # In a small ball the rises are the slopes, and their ratio the cosine.
    put_auxiliary(case.model, scaled(best, 1e-5))
    small = adversity(case.space, case.batches, case.asked(1e-5))
    assert small["captured_sharpness"] == pytest.approx(told["auxiliary_cosine"], rel=1e-3)


def test_a_random_one_captures_about_nothing_and_the_opposite_less() -> None:
    case = Case()
    gradient = Brute(case.model).gradient(case.rows[1])
    cosines = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in gradient]
        put_auxiliary(case.model, scaled(truncated(drawn, 3), 1e-5))
        cosines.append(adversity(case.space, case.batches, case.asked(1e-5))["captured_sharpness"])
    numbers = sum(part.numel() for part in gradient)
    assert abs(sum(cosines)) / 20 < 3 / math.sqrt(20 * numbers)
    put_auxiliary(case.model, scaled(truncated([-part for part in gradient], 3), 1e-5))
    assert adversity(case.space, case.batches, case.asked(1e-5))["captured_sharpness"] < -0.9


def test_its_passes_are_those_that_it_says() -> None:
    case = Case()
    case.batches = case.batches._replace(following=[case.one(case.rows[1])])
    adversity(case.space, case.batches, case.asked())
    assert (case.calls.count(True), case.calls.count(False)) == (GRADIENTS, LOSSES)


def test_it_leaves_weights_gradients_and_modes_as_they_were() -> None:
    case = Case()
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    modes = [module.training for module in case.model.modules()]
    state = torch.get_rng_state()
    adversity(case.space, case.batches, case.asked())
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert [module.training for module in case.model.modules()] == modes
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_before_the_first_step_there_is_no_direction_yet() -> None:
    model, batch = primary_model("mlp", torch.float64)
    randomize(model)
    attach_auxiliary(model, 3)  # with B2 = 0
    space, one = FullSpace(model), [Pass(lambda: model(**batch).loss, 1, len(batch["x"]))]
    told = adversity(space, Batches(one, one, one), of_auxiliary(space, RHO))
    assert "auxiliary_cosine" not in told
    assert (told["auxiliary_norm"], told["captured_sharpness"]) == (0, pytest.approx(0, abs=1e-9))
    assert told["stale_captured_sharpness"] == pytest.approx(1)  # of the very batch


def test_nothing_is_captured_of_no_rise() -> None:
    case = Case()
    for batch in case.rows:
        batch["y"] = case.model.eval()(**batch).logits.detach()  # where the loss has its minimum
    case.batches = Batches(*([case.one(batch)] for batch in case.rows))
    told = adversity(case.space, case.batches, case.asked(1e-9))
    assert told.keys() <= {"auxiliary_norm", "subspace_overlap", "auxiliary_cosine", "stale_cosine"}


def of_rows(one: Tensor, other: Tensor) -> float | None:
    zeros = torch.zeros(7, 2)
    return subspace_overlap([Factors(one, zeros, 1.0)], [Factors(other, zeros, 1.0)])


def test_spans_that_are_the_same_overlap_and_orthogonal_ones_do_not() -> None:
    one = torch.eye(9)[:3]
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) @ one
    assert of_rows(one, mixed) == pytest.approx(1, rel=1e-6)
    assert of_rows(one[:2], mixed) == pytest.approx(1, rel=1e-6)  # it lies in the other
    assert of_rows(one, torch.eye(9)[4:7]) == pytest.approx(0, abs=1e-9)
    assert of_rows(one, torch.eye(9)[2:5]) == pytest.approx(1 / 3, rel=1e-6)
    # A direction that is there twice is one.
    assert of_rows(one[[0, 0, 1]], one[[0, 1]]) == pytest.approx(1, rel=1e-6)
    assert of_rows(torch.zeros(3, 9), one) is None


def test_random_spans_overlap_by_their_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 8, 400, generator=generator) for _ in range(30)]
    found = [of_rows(*draw) for draw in draws]
    assert sum(one or 0.0 for one in found) / 30 == pytest.approx(8 / 400, rel=0.1)
