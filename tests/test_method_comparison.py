"""The public protocol: its data as PEFT's script has them, and answers read as that reads them."""

from __future__ import annotations

from types import ModuleType

import pytest
import yaml
from benchmark_scripts import load

from bilora_ray.search.space.shipped import folder
from bilora_ray.training.metrics import answer, exact_match

FILE = yaml.safe_load((folder() / "comparisons" / "method_comparison.yaml").read_text(encoding="utf-8"))
PATTERN = FILE["trial"]["answer_pattern"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("method_comparison_data")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4^2 = \\boxed{16}.The answer is: 16", "16"),
        ("so 5.\nThe answer is 12.", "12"),
        ("The final answer is: $1,234.", "1234"),
        ("She earns 72.\n#### 72", "72"),
        ("The answer is: 50%", "50"),
        ("The answer is: 3.5!", "3.5"),
        ("The answer is: -7\nQuestion: more", "-7"),
        ("The answer is: 5. The answer is: 6", "6"),
        ("The answer is: x = 2", "x = 2"),
        ("I do not know", None),
        ("The answer is:  ", None),
    ],
)
def test_an_answer_is_read_as_there(text: str, found: str | None) -> None:
    assert answer(text, PATTERN) == found


def test_a_written_answer_is_compared_with_that_of_gsm8k() -> None:
    assert exact_match(["It is so. The answer is: 18.", "#### 17"], ["... #### 18", "... #### 18"], PATTERN) == 0.5


def test_long_rows_are_left_out_and_names_are_one(script: ModuleType) -> None:
    rows = [{"query": "q" * 600, "response": "r" * length, "type": "GSM"} for length in (699, 700)]
    assert script.training_rows(rows) == [{"query": "q" * 600, "response": "r" * 699}]
    assert script.as_asked([{"question": "a", "answer": "b"}]) == [{"query": "a", "response": "b"}]


def test_the_rows_that_validate_are_those_that_numpy_shuffles_first(script: ModuleType) -> None:
    import numpy

    numpy.random.seed(0)
    indices = numpy.arange(7473)
    numpy.random.shuffle(indices)
    assert script.drawn(7473) == list(indices[:50])
