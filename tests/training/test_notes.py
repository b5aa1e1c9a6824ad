"""What is told of data that are allowed and yet seldom meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_trials import Tiny, write_rows

from bilora_ray.training.notes import notes
from bilora_ray.training.rows import load_rows

ROWS = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(20)]


EMPTY = "train_data: 3 of 23 training rows have an empty completion"


def told(tiny: Tiny, workers: int = 1, **settings: Any) -> list[str]:
    config = tiny.config("causal-lm", **settings)
    return list(notes(load_rows(config), config, workers))


def test_nothing_is_told_of_common_data(tiny: Tiny) -> None:
    assert told(tiny) == []
    assert told(tiny, validation_data=None) == []


def test_validation_on_the_training_rows_is_told_also_of_a_copy(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    data = {"train_data": str(tmp_path / "one.jsonl"), "validation_data": str(tmp_path / "other.jsonl")}
    line = "validation_data: holds the rows of train_data, so that no metric shows what generalises"
    assert told(tiny, **data) == [line]


def test_empty_completions_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    empty = [{"prompt": "a", "completion": text} for text in ("", " ", "\n")]
    write_rows(tmp_path / "train.jsonl", ROWS + empty)
    assert told(tiny, train_data=str(tmp_path / "train.jsonl")) == [EMPTY]


def test_rows_that_are_held_out_are_those_of_the_training_data(tiny: Tiny, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "completion": " "}] * 8)
    lines = told(tiny, train_data=str(tmp_path / "train.jsonl"), validation_data=None, validation_fraction=0.25)
    assert lines[:2] == [
        "train_data: 6 of 6 training rows have an empty completion",
        "train_data: 2 of 2 validation rows have an empty completion",
    ]


def test_epochs_beside_steps_are_told(tiny: Tiny) -> None:
    line = "num_train_epochs: changes nothing beside max_steps (8)"
    assert told(tiny, num_train_epochs=3.0) == [line]
    assert told(tiny, num_train_epochs=3.0, max_steps=None) == []


def test_a_completion_without_a_column_is_told(tiny: Tiny) -> None:
    line = "completion_template: names no column, so that every row has the same completion"
    assert told(tiny, completion_template="yes") == [line]
    assert told(tiny, prompt_template="") == []


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (1, {"per_device_train_batch_size": 45}),
        (3, {"per_device_train_batch_size": 15}),
        (1, {"per_device_train_batch_size": 15, "gradient_accumulation_steps": 3}),
    ],
)
def test_a_step_that_takes_more_rows_than_there_are_is_told(workers: int, settings: dict[str, int], tiny: Tiny) -> None:
    line = "per_device_train_batch_size: a step would take 45 rows, and there are 44"
    assert told(tiny, workers, **settings) == [line]
    assert told(tiny, workers, **settings | {"per_device_train_batch_size": 14}) == []
