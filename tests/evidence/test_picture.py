"""The picture of a comparison: a PNG of a size that a page has room for, with all that there is."""

from __future__ import annotations

import struct

import pytest
from test_outcome import ALIKE, BETTER, LORA, outcome, runs

from bilora_ray.evidence.picture import picture


def width_and_height(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_row_an_entry_in_900_pixels() -> None:
    width, height = width_and_height(picture(outcome()))
    assert 1400 < width <= 1800  # at twice its size
    more = outcome(runs=runs("lora", LORA) + sum((runs(f"e{place}", ALIKE) for place in range(9)), ()), tuned=())
    wide, high = width_and_height(picture(more))
    assert wide <= 1800
    assert high - height == 7 * 34 * 2


def test_a_long_name_is_cut_and_does_not_push() -> None:
    named = outcome(runs=runs("lora", LORA) + runs("bilora-" + "very-" * 30 + "long", BETTER), tuned=())
    assert width_and_height(picture(named))[0] <= 1800


@pytest.mark.parametrize("of", [(), runs("lora", LORA), runs("lora", LORA[:2]) + runs("bilora", (0.9, None))])
def test_what_is_not_known_yet_is_no_error(of: tuple[object, ...]) -> None:
    assert width_and_height(picture(outcome(runs=of)))[0] <= 1800
