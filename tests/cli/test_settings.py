"""`settings`: the reference of every key, as the fields themselves have it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from click.testing import CliRunner
from pydantic import Field

from bilora_ray.checking import Int, Settings
from bilora_ray.cli import settings
from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig

Shade = Literal["dark", "light"]


class Kinds(Settings):
    """A setting of every kind of annotation that could allow words."""

    plain: Shade = "dark"
    optional: Shade | None = None
    limited: Annotated[Shade, Field(description="limited")] = "dark"
    several: tuple[Shade, ...] = ()
    of_two: Literal["red"] | Shade = "red"
    by_name: dict[str, Shade | None] = {}
    or_free: Shade | Int | None = None
    number: Int | None = None
    free: str | tuple[str, ...] = ""
    switch: bool = False


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("plain", "dark, light"),
        ("optional", "dark, light"),
        ("limited", "dark, light"),
        ("several", "dark, light"),
        ("of_two", "red, dark, light"),
        ("by_name", "dark, light"),
        ("or_free", "dark, light"),
        ("number", ""),
        ("free", ""),
        ("switch", ""),
    ],
)
def test_the_words_that_a_setting_allows_are_told_wherever_they_stand(
    key: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "SECTIONS", {"trial": Kinds})
    assert {row["key"]: row["allowed"] for row in settings.rows()}[key] == allowed


def listed(*words: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(main, ["settings", *words, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_an_optional_setting_has_its_words() -> None:
    (row,) = listed("quantization")
    assert (row["default"], row["allowed"]) == ("-", "nf4, int8")
    line = "  quantization                 -                of the frozen base weights (QLoRA); needs bitsandbytes"
    assert CliRunner().invoke(main, ["settings", "quantization"]).stdout == f"trial:\n{line} (nf4, int8)\n"


def test_every_setting_is_described_by_its_field() -> None:
    fields = {key: field.description for key, field in TrialConfig.model_fields.items()}
    assert {row["key"]: row["description"] for row in listed() if row["section"] == "trial"} == fields
