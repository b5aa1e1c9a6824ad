"""Which rows are held out and drawn: by seed and count alone, the same on every machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.order import shuffled
from bilora_ray.training.rows import load_rows
from bilora_ray.training.tasks.base import Dataset
from bilora_ray.training.tasks.text import TextRow


def load(folder: Path, count: int, validation: int | None = None, letter: str = "p", **settings: Any) -> Dataset:
    """The rows p0, p1, ... of a file."""
    sizes = {"train_data": count} if validation is None else {"train_data": count, "validation_data": validation}
    for setting, size in sizes.items():
        path = folder / f"{setting}.jsonl"
        lines = [json.dumps({"prompt": f"{letter}{i}", "completion": "c"}) + "\n" for i in range(size)]
        path.write_text("".join(lines))
        settings[setting] = str(path)
    return load_rows(TrialConfig(model_name_or_path="m", task="causal-lm", **settings))


def numbers(rows: Any) -> list[int]:
    assert all(isinstance(row, TextRow) for row in rows)
    return [int(row.prompt[1:]) for row in rows]


def test_shuffled_is_a_permutation_that_its_key_decides() -> None:
    assert shuffled(6, "epoch", 0, 0) == [3, 1, 0, 4, 2, 5]
    orders = {tuple(shuffled(10, *key)) for key in (("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0))}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert shuffled(0, 1) == []


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.1, 1), (25, 0.2, 5)])
def test_rows_are_held_out_for_validation(tmp_path: Path, count: int, fraction: float, held: int) -> None:
    dataset = load(tmp_path, count, validation_fraction=fraction)
    train, validation = numbers(dataset.train), numbers(dataset.validation)
    assert len(validation) == held
    assert sorted(train + validation) == list(range(count))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert set(dataset.digests) == {"train_data"}


def test_the_split_depends_on_seed_and_count_alone(tmp_path: Path) -> None:
    split = numbers(load(tmp_path, 50).validation)
    assert split == numbers(load(tmp_path, 50, letter="q", max_train_samples=7).validation)
    assert split != numbers(load(tmp_path, 50, seed=1).validation)


def test_with_a_seed_of_their_own_the_split_and_the_draw_are_the_same_for_every_seed(tmp_path: Path) -> None:
    def rows(**seeds: int) -> list[list[int]]:
        dataset = load(tmp_path, 50, max_train_samples=20, **seeds)
        return [numbers(dataset.train), numbers(dataset.validation)]

    assert rows(seed=1, split_seed=0) == rows(seed=2, split_seed=0) == rows(seed=0)
    for here, there in zip(rows(seed=0, split_seed=1), rows(seed=0), strict=True):
        assert here != there


def test_the_split_is_the_same_on_every_machine(tmp_path: Path) -> None:
    assert numbers(load(tmp_path, 20, validation_fraction=0.2).validation) == [0, 1, 4, 15]


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, 1)
    path = tmp_path / "train_data.jsonl"
    assert str(caught.value) == f"validation_data: missing, and {path} has too few rows to split (1)"


def test_a_smaller_draw_is_part_of_a_larger_one(tmp_path: Path) -> None:
    def drawn(count: int, seed: int = 0) -> list[int]:
        return numbers(load(tmp_path, 50, 9, max_train_samples=count, seed=seed).train)

    assert set(drawn(5)) < set(drawn(20)) < set(drawn(1000)) == set(range(50))
    assert drawn(20) == sorted(drawn(20))
    assert drawn(20) != drawn(20, seed=1)


def test_validation_takes_the_first_rows(tmp_path: Path) -> None:
    dataset = load(tmp_path, 50, 9, max_eval_samples=4)
    assert numbers(dataset.validation) == [0, 1, 2, 3]
    assert numbers(dataset.train) == list(range(50))
    assert set(dataset.digests) == {"train_data", "validation_data"}


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    dataset = load(tmp_path, 50, validation_fraction=0.5, max_train_samples=20, max_eval_samples=3)
    assert (len(dataset.train), len(dataset.validation)) == (20, 3)
    assert not set(numbers(dataset.train)) & set(numbers(dataset.validation))
