"""What a setting may be in a space file: one of several values, a range, or a value of its own in some trials."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from bilora_ray.checking import Float, Settings
from bilora_ray.config import TrialConfig
from bilora_ray.settings import FACTS, is_number

Value = bool | int | float | str | None


def _one_value(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be one number, text, true, false or null")
    return value


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


OneValue = Annotated[Value, BeforeValidator(_one_value)]
# Setting -> the values that it may have: one, or a list.
When = dict[str, Annotated[tuple[OneValue, ...], Field(min_length=1), BeforeValidator(_several)]]


class Part(Settings):
    """What a setting gets in the trials in which all of `when` is so."""

    when: When = Field(default={}, description="where it is so: settings, each with its value or a list of values")

    @property
    def condition(self) -> str:
        """`when` in words; empty if there is none."""
        return " and ".join(f"{key} is {' or '.join(map(in_yaml, values))}" for key, values in self.when.items())

    def described(self) -> dict[str, Any]:
        """As a space file has it, in full but for what is absent."""
        absent = {key for key, value in self if (value is None and key != "value") or (key == "when" and not value)}
        return self.model_dump(exclude=absent)

    def __str__(self) -> str:
        return self.range + self.told_when

    @property
    def told_when(self) -> str:
        """The condition, as it is told behind a range."""
        return f", when {self.condition}" if self.when else ""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is: a choice, a range, a log range, or given."""

    @property
    @abstractmethod
    def range(self) -> str:
        """What it may be, in words."""


class Choice(Part):
    """One of several values."""

    choice: tuple[OneValue, ...] = Field(min_length=1)

    @property
    def kind(self) -> str:
        """A choice."""
        return "choice"

    @property
    def range(self) -> str:
        """The values."""
        return ", ".join(str(value) for value in self.choice)

    def __str__(self) -> str:
        return f"one of {super().__str__()}"

    def holds(self, value: Value) -> bool:
        """Whether `value` can be drawn."""
        return value in self.choice

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
        return self.choice

    def count(self, whole: bool) -> int | None:
        """How many values it has."""
        return len(self.choice)

    def spread(self, whole: bool, most: int) -> Sequence[Value]:
        """All values."""
        return self.choice


def _spread(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number, or a factor such as 2x")
    text = str(value).strip()
    number, is_factor = text.removesuffix("x"), text.endswith("x")
    try:
        spread = float(number)
    except ValueError:
        raise ValueError("must be a number, or a factor such as 2x") from None
    if is_factor and not 1 < spread < math.inf:
        raise ValueError("a factor must be more than 1x")
    if not is_factor and not 0 < spread < math.inf:
        raise ValueError("must be more than 0")
    return text if is_factor else spread


SPREAD = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*[+]?[0-9._]+([eE][-+]?[0-9]+)?x?\s*$"},
    ]
}


class Prior(Settings):
    """What is believed of a number before anything is measured: where it is good, and how sure that is."""

    mean: Float = Field(description="the best guess")
    sigma: Annotated[float | str, BeforeValidator(_spread), WithJsonSchema(SPREAD)] = Field(
        description="in two of three cases it is so near: a number, or a factor such as 2x on a log scale"
    )

    def __str__(self) -> str:
        near = f"a factor of {self.width:g}" if self.is_factor else f"{self.width:g}"
        return f"believed to be within {near} of {self.mean:g}"

    @property
    def is_factor(self) -> bool:
        """Whether `sigma` is one."""
        return isinstance(self.sigma, str)

    @property
    def width(self) -> float:
        """`sigma` as a number."""
        return float(str(self.sigma).removesuffix("x"))


class Range(Part):
    """Numbers from `low` to `high`, both included; on a log scale or in steps if asked."""

    low: Float
    high: Float
    log: bool = False
    step: Float | None = Field(None, gt=0)
    prior: Prior | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low {self.low:g} and high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must start above 0, got low {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if not self.holds(self.high):
            raise ValueError(
                "high must be a whole number of steps above low, "
                f"got low {self.low:g}, high {self.high:g} and step {self.step:g}"
            )
        return self

    @model_validator(mode="after")
    def _believed_inside(self) -> Range:
        if self.prior is None:
            return self
        if not self.low <= self.prior.mean <= self.high:
            raise ValueError(
                f"prior: mean must be from low {self.low:g} to high {self.high:g}, got {self.prior.mean:g}"
            )
        if self.prior.is_factor and not self.log:
            raise ValueError(f"prior: sigma {self.prior.sigma} is a factor, which needs log: true; give a number")
        if self.log and not self.prior.is_factor:
            raise ValueError(f"prior: sigma of a log range must be a factor such as 2x, got {self.prior.width:g}")
        return self

    @property
    def kind(self) -> str:
        """A range, or a log range."""
        return "log range" if self.log else "range"

    @property
    def range(self) -> str:
        """The ends, with the steps and what is believed."""
        return self._told("")

    def __str__(self) -> str:
        return self._told(", on a log scale" if self.log else "") + self.told_when

    def _told(self, scale: str) -> str:
        step = f", in steps of {self.step:.10g}" if self.step else ""
        prior = f", {self.prior}" if self.prior else ""
        return f"{self.low:.10g} to {self.high:.10g}{scale}{step}{prior}"

    def holds(self, value: Value) -> bool:
        """Whether `value` can be drawn."""
        if not isinstance(value, int | float):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def nearest(self, value: float, whole: bool) -> float:
        """The value that can be drawn, of a setting of `whole` numbers or of another, and is nearest to `value`.

        Of a range in steps it is the number that a person would write: 0.3, and not 0.1 + 0.2.
        """
        unit = self.step or (1.0 if whole else None)
        if unit is not None:
            steps = round((value - self.low) / unit)
            value = float(Decimal(repr(self.low)) + steps * Decimal(repr(unit)))
        value = min(max(value, self.low), self.high)
        return int(value) if whole else value

    def at(self, place: float, whole: bool) -> float:
        """The value at `place`: 0 is the low end, 1 the high one, on its scale."""
        scale, back = (math.log, math.exp) if self.log else (float, float)
        low, high = scale(self.low), scale(self.high)
        return self.nearest(back(low + place * (high - low)), whole)

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
        return (self.low, self.high)

    def count(self, whole: bool) -> int | None:
        """How many values it has, of a setting of `whole` numbers or of another; None: it is continuous."""
        unit = self.step or (1.0 if whole else None)
        return None if unit is None else round((self.high - self.low) / unit) + 1

    def spread(self, whole: bool, most: int) -> Sequence[Value]:
        """All values, or `most` if it has more, evenly on its scale, both ends among them."""
        count = self.count(whole)
        if count is not None and count <= most:
            unit = self.step or 1.0
            return tuple(self.nearest(self.low + unit * index, whole) for index in range(count))
        return tuple(dict.fromkeys(self.at(index / (most - 1), whole) for index in range(most)))


class Given(Part):
    """A value, or what it is derived from: an expression of other settings."""

    value: Any

    @property
    def kind(self) -> str:
        """Given."""
        return "given"

    @property
    def range(self) -> str:
        """The value."""
        return str(self.value)

    def ends(self) -> Sequence[Value]:
        """The value."""
        return (self.value,)


Distribution = Choice | Range
PartT = TypeVar("PartT", Choice, Range, Given, Distribution)


def in_yaml(value: Value) -> str:
    """One value, as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting_of(name: str) -> str:
    """The setting that a distribution is of, by its name: see `Space`."""
    return name.partition("@")[0]


def named(setting: str, part: Part, alone: bool) -> str:
    """What a part of `setting` is called: as the setting, if it is `alone`, else with its condition, in any order."""
    conditions = (f"{key}={'|'.join(sorted(map(in_yaml, values)))}" for key, values in sorted(part.when.items()))
    return setting if alone else f"{setting}@{','.join(conditions)}"


def is_expression(setting: str, value: Any) -> bool:
    """Whether `value` derives `setting` from others, and is no number that YAML 1.1 reads as text, as `3e-4`."""
    if not isinstance(value, str) or setting not in FACTS or not is_number(setting):
        return False
    try:
        float(value)
    except ValueError:
        return value.strip() in TrialConfig.model_fields or bool(re.search(r"[-+*/()]", value))
    return False
