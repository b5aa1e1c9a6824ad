"""What is told of data and settings that are allowed and yet seldom meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import Tiny, write_rows

from bilora_ray.errors import UserError
from bilora_ray.training.rows import load_rows, notes

ROWS = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(44)]
OTHERS = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(44, 62)]
Told = Callable[..., list[str]]


@pytest.fixture
def told(tiny: Tiny, tmp_path: Path) -> Told:
    """The notes on a trial with 44 training rows and 18 others, or on one with other rows and settings."""

    def notes_on(
        train: list[Any] = ROWS, validation: list[Any] | None = OTHERS, workers: int = 1, **settings: Any
    ) -> list[str]:
        data = {"train_data": str(write_rows(tmp_path / "train.jsonl", train)), "validation_data": None}
        if validation is not None:
            data["validation_data"] = str(write_rows(tmp_path / "validation.jsonl", validation))
        config = tiny.config("causal-lm", **data, **settings)
        return list(notes(load_rows(config), config, workers))

    return notes_on


def test_nothing_is_told_of_common_data(told: Told) -> None:
    assert told() == []
    assert told(validation=None) == []
    assert told(validation=OTHERS + ROWS[:18]) == []
    assert told(prompt_template="") == []


def test_validation_on_the_training_rows_is_told(told: Told) -> None:
    line = "validation rows are training rows too, which no metric of generalisation should see"
    assert told(validation=ROWS) == [f"validation_data: 44 of 44 {line}"]
    assert told(validation=OTHERS + ROWS[:19]) == [f"validation_data: 19 of 37 {line}"]
    assert told(train=ROWS * 9, validation=None) == [f"train_data: 40 of 40 {line}"]


def test_empty_completions_are_counted(told: Told) -> None:
    empty = [{"prompt": "a", "completion": text} for text in ("", " ", "\n")]
    assert told(ROWS + empty) == ["train_data: 3 of 47 training rows have an empty completion"]
    assert told(validation=OTHERS + empty) == ["validation_data: 3 of 21 validation rows have an empty completion"]


def test_rejected_answers_are_refused_by_their_label(told: Told, tmp_path: Path) -> None:
    def refused(labels: Sequence[Any], validation: Any = None, **settings: Any) -> str:
        """Where, and what; empty if they are learned."""
        rows = [{**row, "label": label} for row, label in zip(answers, [*labels] * len(answers), strict=False)]
        try:
            told(rows, validation, **named, **settings)
        except UserError as error:
            return str(error).removeprefix(f"{tmp_path}/").removesuffix(cure)
        return ""

    named = {"completion_template": "{answer}"}
    answers = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]
    cure = (
        " marks an answer that was disliked, as in files of preferences; leave such rows out, or learn them too with "
        "format: completion"
    )
    for labels in ([True, False], ["True", "False"], ["", "false"], [None, False], [False]):
        assert refused(labels) == "train.jsonl, line " + ("1: label false" if labels == [False] else "2: label false")
    for labels in ([1, 0], ["1", "0"], [True, 0.0]):
        assert refused(labels) == "train.jsonl, line 2: label 0"
    for labels in ([0], [1], [True], [2, 1, 0], ["false", "true", "unsure"], [None]):
        assert refused(labels) == ""
    assert refused([True], [{**row, "label": False} for row in answers]) == "validation.jsonl, line 1: label false"
    assert refused([1, 0], label_column="other") == refused([1, 0], format="completion") == ""
    assert refused([1, 0], check_labels=False) == refused([1, 0], prompt_template="{prompt} {label}") == ""


def test_rows_that_are_held_out_are_those_of_the_training_data(told: Told) -> None:
    rows = [{"prompt": f"{number}?", "completion": " "} for number in range(8)]
    assert told(rows, None, validation_fraction=0.25, per_device_train_batch_size=2) == [
        "train_data: 6 of 6 training rows have an empty completion",
        "train_data: 2 of 2 validation rows have an empty completion",
    ]


def test_epochs_beside_steps_are_told(told: Told) -> None:
    assert told(num_train_epochs=3.0) == ["num_train_epochs: changes nothing beside max_steps (8)"]
    assert told(num_train_epochs=3.0, max_steps=None) == []


def test_a_completion_without_a_column_is_told(told: Told) -> None:
    line = "completion_template: names no column, so that every row has the same completion"
    assert told(completion_template="yes") == [line]


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (1, {"per_device_train_batch_size": 45}),
        (3, {"per_device_train_batch_size": 15}),
        (1, {"per_device_train_batch_size": 15, "gradient_accumulation_steps": 3}),
    ],
)
def test_a_step_that_takes_more_rows_than_there_are_is_told(workers: int, settings: dict[str, int], told: Told) -> None:
    line = "per_device_train_batch_size: a step would take 45 rows, and there are 44"
    assert told(workers=workers, **settings) == [line]
    assert told(workers=workers, **settings | {"per_device_train_batch_size": 14}) == []
