"""Which rows are held out and drawn: by seed and count alone, the same on every machine."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bilora_ray.checking import completed
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.order import held_out, shuffled, stratified
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
    assert list(shuffled(6, "epoch", 0, 0)) == [3, 1, 0, 4, 2, 5]
    orders = {tuple(shuffled(10, *key)) for key in (("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0))}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert not shuffled(0, 1)


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


def test_validation_rows_are_drawn_by_the_split_seed(tmp_path: Path) -> None:
    def drawn(count: int, **settings: Any) -> list[int]:
        return numbers(load(tmp_path, 5, 40, max_eval_samples=count, **settings).validation)

    assert drawn(8, seed=1) == sorted(drawn(8, seed=1)) != list(range(8))
    assert drawn(8, seed=1) == drawn(8, seed=5, split_seed=1) != drawn(8, split_seed=2)
    assert set(drawn(8)) < set(drawn(20)) < set(drawn(1000)) == set(range(40))
    dataset = load(tmp_path, 50, 9, max_eval_samples=4)
    assert numbers(dataset.train) == list(range(50))
    assert set(dataset.digests) == {"train_data", "validation_data"}


def test_without_stratify_validation_takes_the_first_rows(tmp_path: Path) -> None:
    """As 0.1.0 did, and what was stored by it goes on."""
    assert numbers(load(tmp_path, 50, 9, max_eval_samples=4, stratify=False).validation) == [0, 1, 2, 3]
    assert completed(TrialConfig, {})["stratify"] is False


def test_stratify_moves_no_row_without_labels(tmp_path: Path) -> None:
    def rows(stratify: bool) -> list[list[int]]:
        dataset = load(tmp_path, 50, max_train_samples=20, stratify=stratify)
        return [numbers(dataset.train), numbers(dataset.validation)]

    assert rows(True) == rows(False)


# Labels


def classified(folder: Path, train: str, validation: str | None = None, **settings: Any) -> Dataset:
    """A letter a row is its label, and its place its text."""
    for setting, letters in (("train_data", train), ("validation_data", validation)):
        if letters is not None:
            path = folder / f"{setting}.jsonl"
            path.write_text("".join(json.dumps({"text": i, "label": c}) + "\n" for i, c in enumerate(letters)))
            settings[setting] = str(path)
    return load_rows(TrialConfig(model_name_or_path="m", task="sequence-classification", **settings))


def counts(rows: Any) -> list[int]:
    """Of the labels 0, 1, ... of `rows`."""
    found = Counter(row.label for row in rows)
    return [found[label] for label in range(max(found) + 1)]


def places(rows: Any) -> list[int]:
    return [int(row.text) for row in rows]


SORTED = "a" * 60 + "b" * 30 + "c" * 10


def test_of_a_sorted_file_each_split_and_draw_has_every_labels_share(tmp_path: Path) -> None:
    for seed in range(5):
        dataset = classified(tmp_path, SORTED, split_seed=seed)
        assert (counts(dataset.train), counts(dataset.validation)) == ([54, 27, 9], [6, 3, 1])
        dataset = classified(tmp_path, SORTED, SORTED, split_seed=seed, max_train_samples=50, max_eval_samples=20)
        assert (counts(dataset.train), counts(dataset.validation)) == ([30, 15, 5], [12, 6, 2])
    first = classified(tmp_path, SORTED, SORTED, max_eval_samples=20, stratify=False)
    assert counts(first.validation) == [20]


def test_a_smaller_draw_of_labelled_rows_is_part_of_a_larger_one(tmp_path: Path) -> None:
    draws = [classified(tmp_path, SORTED, SORTED, max_train_samples=n, max_eval_samples=n) for n in (7, 20, 55, 999)]
    for smaller, larger in pairwise(draws):
        assert set(places(smaller.train)) < set(places(larger.train))
        assert set(places(smaller.validation)) < set(places(larger.validation))


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.6])
def test_a_label_with_one_row_is_trained_on(tmp_path: Path, fraction: float) -> None:
    for seed in range(5):
        dataset = classified(tmp_path, "a" * 10 + "b" * 10 + "c", split_seed=seed, validation_fraction=fraction)
        assert counts(dataset.train)[2] == 1
        assert len(dataset.validation) == round(21 * fraction)


def test_held_out_rows_are_as_many_as_asked_for_whatever_their_labels(tmp_path: Path) -> None:
    assert counts(classified(tmp_path, "abc", validation_fraction=0.3).validation).count(1) == 1
    dataset = classified(tmp_path, "aab" * 4, validation_fraction=0.9)
    assert sorted(places(dataset.train) + places(dataset.validation)) == list(range(12))
    assert counts(dataset.train) == [1]


def test_the_stratified_split_is_the_same_on_every_machine(tmp_path: Path) -> None:
    assert places(classified(tmp_path, "aaabbbaaabbb", validation_fraction=0.3).validation) == [0, 1, 4, 11]


@pytest.mark.parametrize("seed", range(20))
def test_every_beginning_of_a_stratified_order_has_each_groups_share(seed: int) -> None:
    groups = [group for group, count in enumerate((57, 28, 14, 1)) for _ in range(count)]
    order = stratified(groups, seed)
    assert sorted(order) == list(range(100))
    for end in range(101):
        found = Counter(groups[row] for row in order[:end])
        assert all(abs(found[group] - groups.count(group) * end / 100) < 1.5 for group in range(4))
    assert stratified([0] * 9, seed) == shuffled(9, seed)
    assert set(held_out(groups, 20, seed)) < set(held_out(groups, 40, seed))


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    dataset = load(tmp_path, 50, validation_fraction=0.5, max_train_samples=20, max_eval_samples=3)
    assert (len(dataset.train), len(dataset.validation)) == (20, 3)
    assert not set(numbers(dataset.train)) & set(numbers(dataset.validation))
