"""A checked space file: which settings each trial gets, and which of them a search chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.expressions import Expression, parsed
from bilora_ray.measures import objective
from bilora_ray.records import Objective
from bilora_ray.search.space.parts import (
    Choice,
    Distribution,
    Given,
    PartT,
    Value,
    is_expression,
    named,
    setting_of,
)
from bilora_ray.search.space.study import ResourceConfig, StudyConfig
from bilora_ray.settings import AMID, FACTS, applies, is_integer


@dataclass(frozen=True)
class Space:
    """A checked space file.

    A distribution has the name of its setting. Of a setting that has several, each under a condition of its own, they
    are called as `learning_rate@method=lora`: to Optuna they are parameters that have nothing in common. Everything
    else knows settings alone; `sampled` and `parameters` map the ones to the others.

    Attributes:
        path: the file.
        study: how to search.
        resources: what one trial gets.
        fixed: settings that all trials share.
        distributions: name -> Choice or Range, in the file's order, but each after those that decide whether it is
            asked for; so `method` is the first.
        points_to_evaluate: settings to try first, each inside its distribution.
        overridden: the trial's settings that are not the file's, for errors.
        given: name -> a value that not all trials share, or an expression; in an order in which they can be computed.
        notes: lines about what the file would search and `--set` takes out of the search.
    """

    path: Path
    study: StudyConfig
    resources: ResourceConfig
    fixed: dict[str, Any]
    distributions: dict[str, Distribution]
    points_to_evaluate: tuple[dict[str, Value], ...]
    overridden: frozenset[str] = frozenset()
    given: dict[str, Given] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def varied(self) -> frozenset[str]:
        """The settings that trials may differ in."""
        return frozenset(map(setting_of, self.parts))

    @cached_property
    def parts(self) -> dict[str, Distribution | Given]:
        """Name -> what a setting gets, if it is asked for."""
        return {**self.distributions, **self.given}

    @cached_property
    def expressions(self) -> dict[str, Expression]:
        """Name -> the expression, of the settings that are derived from others."""
        texts = {name: part.value for name, part in self.given.items() if is_expression(setting_of(name), part.value)}
        return {name: parsed(text) for name, text in texts.items()}

    @cached_property
    def deciding(self) -> frozenset[str]:
        """The settings that decide which others a trial is asked for: those in conditions, and the method."""
        keys = {key for part in self.parts.values() for key in part.when}
        by_method = any(not self.methods <= set(FACTS[key].of) for key in self.varied)
        return frozenset(keys | {"method"}) if by_method else frozenset(keys)

    @cached_property
    def methods(self) -> frozenset[str]:
        """The methods that trials may have."""
        parts = [part for name, part in self.parts.items() if setting_of(name) == "method"]
        found = {str(value) for part in parts for value in part.ends()}
        if all(part.when for part in parts):  # or there is none
            found.add(str(self.fixed.get("method", TrialConfig.model_fields["method"].default)))
        return frozenset(found)

    def mapped(self, of: Callable[[str, Any], Any]) -> Space:
        """The space with each value of each setting as `of` has it, as of files that were moved."""

        def parts(found: Mapping[str, PartT]) -> dict[str, PartT]:
            moved = {name: _mapped(setting_of(name), part, of) for name, part in found.items()}
            return {named(setting_of(name), part, alone="@" not in name): part for name, part in moved.items()}

        return replace(
            self,
            fixed={key: of(key, value) for key, value in self.fixed.items()},
            distributions=parts(self.distributions),
            given=parts(self.given),
            points_to_evaluate=tuple(
                {key: of(key, v) for key, v in point.items()} for point in self.points_to_evaluate
            ),
        )

    def names_of(self, setting: str) -> list[str]:
        """The names of the distributions of `setting`."""
        return [name for name in self.distributions if setting_of(name) == setting]

    def sampled(self, parameters: Mapping[str, Value]) -> dict[str, Value]:
        """Setting -> value, of Optuna's `parameters`, in which steps add up as floats do."""
        return {setting_of(name): self._as_written(name, value) for name, value in parameters.items()}

    def parameters(self, sampled: Mapping[str, Value]) -> dict[str, Value]:
        """Optuna's parameters -> value, of settings that go together: what `sampled` is the inverse of."""
        values = self.sampled(sampled)
        asked = (name for name in self.distributions if setting_of(name) in values and self.asked(name, values))
        return {name: values[setting_of(name)] for name in asked}

    def asked(self, name: str, sampled: Mapping[str, Value]) -> bool:
        """Whether a trial has the part `name` once `sampled`, by setting or by name, holds what comes before it.

        Its method must read the setting, and the condition be met. One on a setting that the trial itself is not asked
        for is not.
        """
        return self._asked(name, self._values(sampled))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What trials are judged by; the first chooses each trial's adapter."""
        metric = str(self.fixed.get("metric", TrialConfig.model_fields["metric"].default))
        return tuple(objective(one.metric) for one in self.study.objectives) or (objective(metric),)

    def trial_config(self, sampled: Mapping[str, Value]) -> TrialConfig:
        """The settings of the trial that got `sampled`, by setting or by name; UserError if they do not go together."""
        return build(TrialConfig, self.settings(sampled), f"{self.path}: trial", self.overridden)

    def settings(self, sampled: Mapping[str, Value]) -> dict[str, Any]:
        """As `trial_config`, before they are checked: setting -> value, of those that have not their default."""
        values = self._values(sampled)
        for name, expression in self.expressions.items():
            if self._asked(name, values):
                values[setting_of(name)] = self.derived(expression, name, values)
        return values

    def derived(self, expression: Expression, name: str, values: Mapping[str, Any]) -> float:
        """The number that `expression` is for the part `name` in a trial with these `values`. UserError if none is."""
        try:
            return expression.value(lambda key: _number(key, values))
        except ValueError as error:
            raise UserError(f"{self.path}: trial.{setting_of(name)}: {error}") from None

    def each(self, values: Callable[[str], Iterable[Value]]) -> Iterator[dict[str, Value]]:
        """All that trials can get if the distributions that they are asked for have the `values` of their names."""
        return self._each(tuple(self.distributions), {}, values)

    def first(self, values: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """What a trial samples that gets the first choice, or the low end, where `values`, by setting, say nothing."""
        said = values or {}
        return next(self.each(lambda name: [said.get(setting_of(name), self.ends(name)[0])]))

    def first_config(self) -> TrialConfig:
        """The settings of a trial that gets the first choice, or the low end, of every distribution."""
        return self.trial_config(self.first())

    def with_step(self, choose: Callable[..., Any]) -> TrialConfig:
        """As `first_config`, of the trial whose steps take the most training rows, or the fewest: `max`, or `min`."""
        return self.with_end(choose, lambda config: config.step_rows(self.resources.workers))

    def with_end(self, choose: Callable[..., Any], of: Callable[[TrialConfig], float]) -> TrialConfig:
        """As `first_config`, of the trial that has the largest, or the smallest, number `of` it: `max`, or `min`."""

        def number(sampled: Mapping[str, Value]) -> float:
            return of(self.trial_config(sampled))

        found = []
        for sampled in self.each(lambda name: self.deciding_values(name) or self.ends(name)[:1]):
            for name in sampled:
                if not self.decides(name):
                    sampled = choose([{**sampled, name: end} for end in self.ends(name)], key=number)
            found.append(sampled)
        return self.trial_config(choose(found, key=number))

    def deciding_values(self, name: str) -> tuple[Value, ...]:
        """Of a distribution that decides which others a trial is asked for, its ends and a value of each case."""
        return tuple(dict.fromkeys((*self.ends(name), *self.cases(name)))) if self.decides(name) else ()

    def each_case(self) -> Iterator[dict[str, Value]]:
        """As `each`, one for each case that conditions and methods tell from the others."""
        return self.each(lambda name: self.cases(name) if self.decides(name) else self.ends(name)[:1])

    def each_value(self, setting: str) -> Iterator[dict[str, Value]]:
        """As `each_case`, with each value that must be allowed of `setting`; the first one's trial is the first."""

        def values(name: str) -> Iterable[Value]:
            if setting_of(name) == setting:
                return self.ends(name)
            return self.cases(name) if self.decides(name) else self.ends(name)[:1]

        return self.each(values)

    def decides(self, name: str) -> bool:
        """Whether the value of the distribution `name` decides which others a trial is asked for."""
        return setting_of(name) in self.deciding

    @cached_property
    def changing(self) -> tuple[str, ...]:
        """The distributions of which a trial may get another value amid its training."""
        return tuple(name for name in self.distributions if setting_of(name) in AMID and not self.decides(name))

    def ends(self, name: str) -> Sequence[Value]:
        """The values that must be allowed if every value of the distribution `name` is to be."""
        return self.distributions[name].ends()

    def count(self, name: str) -> int | None:
        """How many values the distribution `name` has; None: it is continuous."""
        return self.distributions[name].count(is_integer(setting_of(name)))

    def spread(self, name: str, most: int) -> Sequence[Value]:
        """All values of the distribution `name`, or about `most` of a range that has more, both ends among them."""
        return self.distributions[name].spread(is_integer(setting_of(name)), most)

    def cases(self, name: str) -> dict[Value, int]:
        """Values of the distribution `name` that conditions tell from each other -> how many values are as these."""
        distribution, key = self.distributions[name], setting_of(name)
        if isinstance(distribution, Choice):
            return dict.fromkeys(distribution.choice, 1)
        asked = {value for part in self.parts.values() for value in part.when.get(key, ())}
        told: dict[Value, int] = dict.fromkeys(filter(distribution.holds, asked), 1)
        others = [value for value in self.spread(name, len(told) + 2) if value not in told]
        return {**told, **dict.fromkeys(others[:1], (self.count(name) or 0) - len(told))}

    def size(self) -> int | None:
        """How many different trials there are; None: a setting is continuous."""
        total = 0
        for sampled in self.each_case():
            counts = [self.cases(n)[v] if self.decides(n) else self.count(n) for n, v in sampled.items()]
            if None in counts:
                return None
            total += math.prod(count for count in counts if count is not None)
        return total

    def _each(
        self, names: tuple[str, ...], sampled: dict[str, Value], values: Callable[[str], Iterable[Value]]
    ) -> Iterator[dict[str, Value]]:
        if not names:
            yield sampled
        elif not self.asked(names[0], sampled):
            yield from self._each(names[1:], sampled, values)
        else:
            for value in values(names[0]):
                yield from self._each(names[1:], {**sampled, names[0]: value}, values)

    def _as_written(self, name: str, value: Value) -> Value:
        part = self.distributions.get(name)
        if isinstance(part, Choice) or not isinstance(value, float) or part is None or part.step is None:
            return value
        return part.nearest(value, is_integer(setting_of(name))) if part.holds(value) else value

    def _values(self, sampled: Mapping[str, Value]) -> dict[str, Any]:
        """Setting -> value, of all that a trial with `sampled` is given, but for what is derived."""
        values = {**self.fixed, **self.sampled(sampled)}
        for name, part in self.given.items():
            if name not in self.expressions and self._asked(name, values):
                values[setting_of(name)] = part.value
        return values

    def _asked(self, name: str, values: Mapping[str, Any]) -> bool:
        method = values.get("method", TrialConfig.model_fields["method"].default)
        when = self.parts[name].when.items()
        return applies(setting_of(name), str(method)) and all(self._has(key, values, allowed) for key, allowed in when)

    def _has(self, key: str, values: Mapping[str, Any], allowed: Sequence[Value]) -> bool:
        if key not in values and key in self.varied:
            return False
        return values.get(key, TrialConfig.model_fields[key].default) in allowed


def _mapped(setting: str, part: PartT, of: Callable[[str, Any], Any]) -> PartT:
    update: dict[str, Any] = {"when": {key: tuple(of(key, v) for v in values) for key, values in part.when.items()}}
    if isinstance(part, Choice):
        update["choice"] = tuple(of(setting, value) for value in part.choice)
    if isinstance(part, Given):
        update["value"] = of(setting, part.value)
    return part.model_copy(update=update)


def _number(key: str, values: Mapping[str, Any]) -> float:
    """The number of a setting. ValueError if it has none."""
    value = values.get(key, TrialConfig.model_fields[key].default)
    if value is None:
        raise ValueError(f"{key} has no value there")
    return int(float(value)) if is_integer(key) else float(value)
