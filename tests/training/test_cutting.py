"""How rows are cut into passes: the cheapest cut there is, within its budget, and the same gradient as of one pass."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny_trials import TASKS, Tiny

from bilora_ray.measures import Task
from bilora_ray.training.compute import cutting
from bilora_ray.training.compute.cutting import Budget, Sides, cut, positions
from bilora_ray.training.distributed.workers import random_states, set_random_states
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.metrics import IGNORED


@pytest.fixture(params=[0, 3, 40])
def overhead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a pass costs beside its positions."""
    monkeypatch.setitem(cutting.OVERHEAD, "cpu", request.param)
    return int(request.param)


def cheapest(sides: list[Sides], budget: Budget, overhead: int) -> int:
    """What the best of all cuts of the sorted rows costs."""
    rows = sorted(sides, key=lambda side: -sum(side))
    of_side, of_all = budget.limits(sides)
    best = None
    for count in range(len(rows)):
        for places in combinations(range(1, len(rows)), count):
            ends = [*places, len(rows)]
            parts = [rows[start:end] for start, end in zip([0, *places], ends, strict=True)]
            fits = all(
                len(part) == 1
                or (
                    positions(part) <= of_all
                    and all(
                        len(part) * max(side) <= most
                        for side, most in zip(zip(*part, strict=True), of_side, strict=True)
                    )
                )
                for part in parts
            )
            cost = sum(positions(part) + overhead for part in parts)
            if fits and (best is None or cost < best):
                best = cost
    assert best is not None
    return best


@pytest.mark.parametrize(
    "budget", [Budget(3), Budget(9), Budget(4, proven=25), Budget(2, positions=40), Budget(2, positions=40, proven=5)]
)
@pytest.mark.parametrize("count", [1, 2])
def test_no_other_cut_of_the_sorted_rows_costs_less(count: int, budget: Budget, overhead: int) -> None:
    random = Random(f"{count} {overhead}")
    for _ in range(20):
        sides = [tuple(random.choices(range(1, 20), k=count)) for _ in range(9)]
        parts = cut(sides, budget, "cpu")
        assert sorted(row for part in parts for row in part) == list(range(9))
        found = [[sides[row] for row in part] for part in parts]
        assert sum(positions(part) + overhead for part in found) == cheapest(sides, budget, overhead)
        of_side, of_all = budget.limits(sides)
        for part in found:
            longest = map(max, zip(*part, strict=True))
            within = positions(part) <= of_all and all(
                len(part) * a <= b for a, b in zip(longest, of_side, strict=True)
            )
            assert len(part) == 1 or within


def test_the_longest_rows_come_first_and_one_pass_keeps_its_order() -> None:
    sides = [(3,), (900,), (5,), (890,), (4,)]
    assert cut(sides, Budget(5), "cpu") == [[1, 3], [2, 4, 0]]
    assert cut([(3,), (9,), (5,)], Budget(3), "cpu") == [[0, 1, 2]]
    assert cut(sides, Budget(1), "cpu") == [[0], [1], [2], [3], [4]]
    # Images are all alike: passes as full as they may be.
    assert list(map(len, cut([(1,)] * 10, Budget(4), "cpu"))) == [4, 4, 2]


def test_rows_one_after_another_are_cut_by_their_sum() -> None:
    sides = [(9,), (1,), (1,), (1,), (6,)]
    assert cut(sides, Budget(2, padded=False), "cpu") == [[0, 1, 2, 3, 4]]
    assert cut(sides, Budget(2, positions=10, padded=False), "cpu") == [[0], [4, 1, 2, 3]]
    assert cut(sides, Budget(2, proven=7, padded=False), "cpu") == [[0], [4, 1], [2, 3]]
    assert cut(sides, Budget(2, padded=False), "cpu", workers=2) == [[0], [4, 1, 2, 3]]
    assert positions(sides, padded=False) == 18 < positions(sides)


def test_one_row_is_a_pass_unless_positions_are_counted() -> None:
    sides = [(5,), (9,), (5,)]
    assert cut(sides, Budget(1), "cpu") == [[0], [1], [2]]
    assert cut(sides, Budget(1, positions=10), "cpu") == [[1], [0, 2]]


def test_a_gpu_gets_fewer_and_fuller_passes() -> None:
    random = Random(0)
    sides = [(random.randrange(50, 400),) for _ in range(32)]
    assert len(cut(sides, Budget(32), "cuda")) < len(cut(sides, Budget(32), "cpu")) < 32


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_get_equally_many_passes_and_none_a_needlessly_large_one(workers: int) -> None:
    random = Random(workers)
    for _ in range(20):
        sides = [(random.randrange(10, 500),) for _ in range(10)]
        parts = cut(sides, Budget(4), "cpu", workers)
        assert sorted(row for part in parts for row in part) == list(range(10))
        assert len(parts) % workers == 0
        rows = sorted(sides, reverse=True)
        other_cuts = (
            [rows[start:end] for start, end in zip((0, *places), (*places, 10), strict=True)]
            for places in combinations(range(1, 10), len(parts) - 1)
        )
        smallest = min(max(map(positions, other)) for other in other_cuts)
        assert max(positions([sides[row] for row in part]) for part in parts) == smallest
    assert [len(part) for part in cut([(5,)] * 2, Budget(8), "cpu", 3)] == [1, 1]  # there are no more rows


@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_is_that_of_one_pass(
    task: Task, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # losses would be of float32
    gradients: list[dict[str, torch.Tensor]] = []
    for name, settings in {
        "one": {"per_device_train_batch_size": 24, "tokens_per_pass": 10**6},
        "cut": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},
        "tiny": {"per_device_train_batch_size": 24, "tokens_per_pass": 40},
    }.items():
        run = exact(Run(tiny.config(task, **settings), TrialFolder(tmp_path / name)))
        parts: list[int] = []
        run.model.register_forward_pre_hook(lambda *_, parts=parts: parts.append(1))
        run.gradients.closure(run._next_rows())()
        assert (len(parts) > 1) is (name != "one") or task == "image-classification"
        gradients.append({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})
    one, *others = gradients
    for other in others:
        assert other.keys() == one.keys()
        for name, gradient in one.items():
            assert (other[name] - gradient).norm() <= 1e-12 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "token-classification"])
def test_a_pass_without_any_target_adds_nothing(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config(task, per_device_train_batch_size=1), TrialFolder(tmp_path))
    run.model.eval()
    row, other = run.data.train[:2]
    empty = replace(other, labels=array("i", [IGNORED] * len(other.labels)))

    def found(*examples: Any) -> list[torch.Tensor]:
        loss = run.gradients.closure(list(examples))()
        return [loss, *(p.grad for p in run.model.parameters() if p.grad is not None)]

    alone, beside = found(row), found(empty, row)
    assert all(map(torch.equal, alone, beside))
    assert len(alone) == len(beside)
    assert not any(part.any() for part in found(empty))


def gradients_of(run: Run) -> list[torch.Tensor]:
    return [p.grad.clone() for p in run.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("task", TASKS)
def test_rows_one_by_one_add_up_to_the_step(
    task: Task, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # losses would be of float32
    run = exact(Run(tiny.config(task, per_device_train_batch_size=6), TrialFolder(tmp_path)))
    rows = run._next_rows()
    closure = run.gradients.closure(rows)
    loss = float(closure())
    whole = gradients_of(run)
    parts = closure.by_row()
    assert parts.shape == (6,)
    assert float(parts.sum()) == pytest.approx(loss, rel=1e-6)
    for found, expected in zip(gradients_of(run), whole, strict=True):
        assert (found - expected).norm() <= 1e-12 * max(1.0, float(expected.norm()))
    before = gradients_of(run)
    assert torch.equal(closure.by_row(gradient=False), parts)
    assert all(map(torch.equal, gradients_of(run), before))
    some = float(closure.by_row([4, 1]).sum())
    chosen = gradients_of(run)
    assert some == pytest.approx(float(run.gradients.closure([rows[4], rows[1]])()), rel=1e-6)
    for found, expected in zip(gradients_of(run), chosen, strict=True):
        assert (found - expected).norm() <= 1e-12 * max(1.0, float(expected.norm()))


def test_a_row_has_its_dropout_whichever_others_are_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 6, "lora_dropout": 0.5, "method": "esam"}
    run = Run(tiny.config("sequence-classification", **settings), TrialFolder(tmp_path))
    for module in run.model.modules():  # 0 at first, of which dropout would show nothing
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    run.model.train()
    before = random_states()
    closure = run.gradients.closure(run._next_rows())
    parts, once_more, some = closure.by_row(), closure.by_row(gradient=False), closure.by_row([4, 1], gradient=False)
    assert torch.equal(once_more, parts)
    assert torch.allclose(some * 2, parts[[4, 1]] * 6)
    set_random_states(before)
    assert torch.equal(run.gradients.closure(closure._examples).by_row(), parts)
    assert not torch.allclose(run.gradients.closure(closure._examples).by_row(), parts)


def test_rows_weigh_as_their_classes_do(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "class_weights": "balanced"}
    run = Run(tiny.config("sequence-classification", **settings), TrialFolder(tmp_path))
    run.model.eval()
    closure = run.gradients.closure(run._next_rows())
    assert float(closure.by_row().sum()) == pytest.approx(float(closure()), rel=1e-5)


def exact(run: Run) -> Run:
    """`run` in float64 and without any dropout, whose masks depend on the passes."""
    run.model.double()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    original: Any = run.gradients.batch
    run.gradients.batch = lambda rows: {  # type: ignore[method-assign]
        key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in original(rows).items()
    }
    return run
