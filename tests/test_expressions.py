"""Arithmetic over names: what it is worth, and that a text is never more than that."""

import math

import pytest

from bilora_ray.expressions import LONGEST, parsed

NUMBERS = {"rank": 8, "rho": 0.05, "huge": 10**20}


def value(text: str) -> float:
    return parsed(text).value(NUMBERS.__getitem__)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 * rank", 16),
        (" -rank + 3 ", -5),
        ("rank / 3", 8 / 3),
        ("rank // 3", 2),
        ("2 ** -rank", 2**-8),
        ("2 ** rank", 256),
        ("(rank - 2) * (rank + 2)", 60),
        ("min(rank, 4, 6) + max(rank, 1)", 12),
        ("round(rho * 100)", 5),
        ("int(rank * 0.3)", 2),
        ("rho * 1e-2", 5e-4),
    ],
)
def test_it_is_what_python_makes_of_it(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected)
    assert type(value(text)) is type(expected)


def test_its_names_come_in_order_and_once() -> None:
    assert parsed("rho * rank + max(rho, 2)").names == ("rho", "rank")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "rank.real",
        "rank[0]",
        "[rank for rank in rank]",
        "lambda: 1",
        "rank if rank else 2",
        "rank and 2",
        "rank < 2",
        "'a' * 2",
        "True + 1",
        "2j * rank",
        "min(rank)",
        "round(rho, 2)",
        "max(*rank, 2)",
        "min(rank, 2, key=rank)",
        "eval(rank)",
        "rank % 2",
        "rank := 2",
        "2 *",
        "",
        "(" * 150 + "rank" + ")" * 40,
        "1 + " * LONGEST + "1",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expression|longer") as error:
        parsed(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1 / (rank - 8)", "divides by zero"),
        ("rank // 0", "divides by zero"),
        ("10 ** 9 ** 9 ** 9", "is too large a number"),
        ("1e308 * 10", "is too large a number"),
        (" * ".join(["huge"] * 20), "is too large a number"),
        ("(rho - 1) ** 0.5", "is no real number"),
    ],
)
def test_what_has_no_finite_value_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        value(text)


def test_whole_numbers_stay_exact_as_far_as_floats_do() -> None:
    assert value("2 ** 52") == 2**52
    assert isinstance(value("2 ** 80"), float)
    assert math.isclose(value("2 ** 80"), 2**80)
