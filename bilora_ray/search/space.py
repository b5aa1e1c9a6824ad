"""What a space file says, checked: one file is one study.

    study:      how to search                      (StudyConfig)
    trial:      settings of every trial; any of them may be a distribution
    resources:  what one trial gets                (ResourceConfig)

A distribution is `{choice: [a, b]}` or `{low: x, high: y}` with `log: true` or `step: s` if wanted, and with
`prior: {mean: m, sigma: 2x}` if something is known of it beforehand. A number may be derived, as `2 * rank`. With
`when: {method: bilora}` a setting has its distribution, or its `{value: v}`, where that is so, and its default
elsewhere; a list of such gives it one in each case. Nothing here imports torch, Ray or Optuna, so that a space file is
checked in a moment. `space_file` reads one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from bilora_ray.checking import Float, Int, Settings, build
from bilora_ray.config import FACTS, TrialConfig, applies, is_integer, is_number, objective
from bilora_ray.errors import UserError
from bilora_ray.expressions import Expression, parsed
from bilora_ray.facts import METHOD_NAMES
from bilora_ray.records import Objective

Value = bool | int | float | str | None
# What a search may use, beside its number of trials.
BUDGETS = ("max_hours", "max_device_hours", "max_cost", "price_per_gpu_hour", "target", "min_gain")
# The units of rungs of which a part is enough.
PARTED = frozenset({"epochs", "seconds"})
# The settings that only some schedulers read.
READ_BY = {
    "rung_unit": ("asha", "hyperband", "median"),
    "grace_period": ("asha", "hyperband", "median"),
    "reduction_factor": ("asha", "hyperband"),
    "min_trials": ("median",),
}
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What the study of a study's finalists is called.
FINALISTS_OF = "{}-finalists"


def _one_value(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be one number, text, true, false or null")
    return value


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


OneValue = Annotated[Value, BeforeValidator(_one_value)]
# Setting -> the values that it may have: one, or a list.
When = dict[str, Annotated[tuple[OneValue, ...], Field(min_length=1), BeforeValidator(_several)]]


class ObjectiveConfig(Settings):
    """One of the things that a study looks for."""

    metric: str = Field(description="what an evaluation tells, such as eval_loss or train_runtime")
    mode: Literal["min", "max"] | None = Field(None, description="which is better, as a check: each metric has its own")


class StudyConfig(Settings):
    """How a study searches."""

    name: str = Field(description="name of the study and of its folder: letters, digits, '.', '_' and '-'")
    project: str = Field("bilora-ray", min_length=1, description="MLflow experiment that the study belongs to")
    num_trials: Int = Field(20, ge=1, description="trials to finish")
    sampler: Literal["tpe", "gp", "cmaes", "random", "grid", "qmc", "nsga2", "nsga3"] = Field(
        "tpe",
        description="how settings are proposed: tpe learns, of any space; gp from few trials; cmaes over many, of "
        "numbers only; random; grid runs each combination once; qmc fills the space evenly; nsga2 and nsga3 are for "
        "several objectives",
    )
    scheduler: Literal["asha", "hyperband", "median", "none"] = Field(
        "asha", description="whether weak trials are stopped early"
    )
    rung_unit: Literal["steps", "epochs", "rows", "tokens", "seconds"] | None = Field(
        None,
        description="what trials are compared after as much of, and what grace_period is in; rows if absent, with "
        "grace_period in steps of the largest batch that is searched",
    )
    grace_period: Int | Float | None = Field(
        None, gt=0, description="how much of rung_unit comes before the first stop; a ninth of a trial if absent"
    )
    reduction_factor: Int = Field(3, ge=2, description="at each rung one of so many trials goes on")
    min_trials: Int = Field(5, ge=1, description="median: complete trials to compare with, at the least")
    objectives: tuple[ObjectiveConfig, ...] = Field(
        (),
        description="what trials are judged by, such as [{metric: eval_loss}, {metric: train_runtime}]; the first "
        "chooses a trial's adapter, whose values the others are. trial.metric alone if absent",
    )
    max_adapter_mb: Float | None = Field(
        None,
        gt=0,
        description="MB (10^6 bytes) of an adapter at the most; a trial above it ends at its first evaluation",
    )
    max_memory_gb: Float | None = Field(
        None,
        gt=0,
        description="GiB of its GPU that a worker may take, as gpu_memory_gib tells it; a trial above it ends",
    )
    seed: Int = Field(0, ge=0, lt=2**32, description="of the proposals")
    max_concurrent: Int | None = Field(None, ge=1, description="trials at one time; what the cluster holds if absent")
    max_hours: Float | None = Field(None, gt=0, description="hours that the search may run, all its starts together")
    max_device_hours: Float | None = Field(
        None, gt=0, description="hours of training on one GPU, or by one worker that has none, all trials together"
    )
    max_cost: Float | None = Field(None, gt=0, description="price of the device-hours; needs price_per_gpu_hour")
    price_per_gpu_hour: Float | None = Field(None, gt=0, description="of a device-hour, in the currency of max_cost")
    target: Float | None = Field(None, description="a value of the metric that is good enough: the search ends with it")
    min_gain: Float | None = Field(
        None,
        gt=0,
        description="the search ends when no settings promise to be better by so much, such as the noise of the metric",
    )
    points_to_evaluate: tuple[dict[str, OneValue], ...] = Field((), description="settings to try first")
    finalists: Int = Field(0, ge=0, description="best trials that fresh seeds are to judge after the search; 0: none")
    finalist_seeds: Int | None = Field(
        None, ge=2, description="trainings of each finalist, each with a seed that no trial had; 3 if absent"
    )
    keep_adapters: Int | None = Field(None, ge=1, description="best trials whose adapters are kept; all if absent")
    max_disk_gb: Float | None = Field(
        None,
        gt=0,
        description="what the study's folder may hold: beyond it the worst adapters go, then no trial begins",
    )
    warm_start: tuple[str, ...] = Field((), description="earlier studies, from whose best trials the search starts")

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not STUDY_NAME.fullmatch(value):
            raise ValueError("must be up to 100 letters, digits, '.', '_' or '-', the first a letter or a digit")
        return value

    @model_validator(mode="after")
    def _priced(self) -> StudyConfig:
        if self.max_cost is not None and self.price_per_gpu_hour is None:
            raise ValueError("max_cost needs price_per_gpu_hour")
        if self.min_gain is not None and len(self.objectives) > 1:
            raise ValueError("min_gain: is of one objective; of several there is no single best to gain on")
        return self

    @model_validator(mode="after")
    def _finalists_possible(self) -> StudyConfig:
        if self.finalist_seeds is not None and not self.finalists:
            raise ValueError("finalist_seeds: there are no finalists to train; finalists says how many there are")
        if self.finalists and not STUDY_NAME.fullmatch(FINALISTS_OF.format(self.name)):
            raise ValueError(f"name: is too long for the study of its finalists, {FINALISTS_OF.format('NAME')}")
        return self

    @field_validator("grace_period")
    @classmethod
    def _whole_unless_parted(cls, value: float | None, info: ValidationInfo) -> float | None:
        unit = info.data.get("rung_unit") or "steps"
        if value is not None and unit not in PARTED and value != int(value):
            raise ValueError(f"must be a whole number of {unit}")
        return value


class ResourceConfig(Settings):
    """What one trial gets of the cluster."""

    workers: Int = Field(1, ge=1, description="processes that train a trial together; each takes a batch of its own")
    min_workers: Int | None = Field(None, ge=1, description="go on with so few where workers are lost; same results")
    parallelism: Literal["ddp", "fsdp"] = Field("ddp", description="the model on each worker, or a part of it on each")
    cpus_per_worker: Float = Field(1, gt=0, description="CPU cores")
    gpus_per_worker: Float = Field(0, ge=0, description="GPUs; a fraction shares one")

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_gpus(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a part of one GPU, below 1, or whole GPUs")
        return value

    @model_validator(mode="after")
    def _possible(self) -> ResourceConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than the {self.workers} workers")
        if self.workers == 1 and (self.min_workers is not None or self.parallelism == "fsdp"):
            key = "min_workers" if self.min_workers is not None else "parallelism: fsdp"
            raise ValueError(f"{key} needs workers: 2 or more")
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError("gpus_per_worker: workers of one trial cannot share a GPU; give each 1")
        return self


class Part(Settings):
    """What a setting gets in the trials in which all of `when` is so."""

    when: When = Field(default={}, description="where it is so: settings, each with its value or a list of values")

    @property
    def condition(self) -> str:
        """`when` in words; empty if there is none."""
        return " and ".join(f"{key} is {' or '.join(map(_word, values))}" for key, values in self.when.items())

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
    def kind(self) -> str:
        """What it is: a choice, a range, a log range, or given."""
        raise NotImplementedError

    @property
    def range(self) -> str:
        """What it may be, in words."""
        raise NotImplementedError


def _evenly(low: float, high: float, most: int) -> Iterator[float]:
    return (low + (high - low) * index / (most - 1) for index in range(most))


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


class Prior(Settings):
    """What is believed of a number before anything is measured: where it is good, and how sure that is."""

    mean: Float = Field(description="the best guess")
    sigma: Annotated[float | str, BeforeValidator(_spread)] = Field(
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

    def holds(self, value: float) -> bool:
        """Whether `value` can be drawn."""
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def nearest(self, value: float, whole: bool) -> float:
        """The value that can be drawn, of a setting of `whole` numbers or of another, and is nearest to `value`."""
        unit = self.step or (1.0 if whole else None)
        if unit is not None:
            value = self.low + unit * round((value - self.low) / unit)
        value = min(max(value, self.low), self.high)
        return int(value) if whole else value

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
        return (self.low, self.high)

    def count(self, whole: bool) -> int | None:
        """How many values it has, of a setting of `whole` numbers or of another; None: it is continuous."""
        unit = self.step or (1.0 if whole else None)
        return None if unit is None else round((self.high - self.low) / unit) + 1

    def spread(self, whole: bool, most: int) -> Sequence[Value]:
        """All values, or `most` if it has more, evenly on its scale, both ends among them."""
        count, unit = self.count(whole), self.step or 1.0
        if count is not None and count <= most:
            found = [self.low + unit * index for index in range(count)]
        elif self.log:
            found = [math.exp(value) for value in _evenly(math.log(self.low), math.log(self.high), most)]
        else:
            found = list(_evenly(self.low, self.high, most))
        if count is not None:
            found = [self.low + unit * round((value - self.low) / unit) for value in found]
        inside = [min(max(value, self.low), self.high) for value in found]
        return tuple(dict.fromkeys(map(int, inside) if whole else inside))


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


Distribution = Choice | Range
# A limit of a study -> the metric that must not be above it.
LIMITED = {"max_adapter_mb": "adapter_mb", "max_memory_gb": "gpu_memory_gib"}
PartT = TypeVar("PartT", Choice, Range, Given, Distribution)


def _word(value: Value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting_of(name: str) -> str:
    """The setting that a distribution is of, by its name: see `Space`."""
    return name.partition("@")[0]


def named(setting: str, part: Part, alone: bool) -> str:
    """What a part of `setting` is called: as the setting, if it is `alone`, else with its condition."""
    conditions = (f"{key}={'|'.join(map(_word, values))}" for key, values in part.when.items())
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
    """

    path: Path
    study: StudyConfig
    resources: ResourceConfig
    fixed: dict[str, Any]
    distributions: dict[str, Distribution]
    points_to_evaluate: tuple[dict[str, Value], ...]
    overridden: frozenset[str] = frozenset()
    given: dict[str, Given] = field(default_factory=dict)

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
        by_method = any(FACTS[key].of != METHOD_NAMES for key in self.varied)
        return frozenset(keys | {"method"}) if by_method else frozenset(keys)

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
        """Setting -> value, of Optuna's `parameters`."""
        return {setting_of(name): value for name, value in parameters.items()}

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

        def rows(sampled: Mapping[str, Value]) -> int:
            return self.trial_config(sampled).step_rows(self.resources.workers)

        found = []
        for sampled in self.each_case():
            for name in sampled:
                if not self.decides(name):
                    sampled = choose([{**sampled, name: end} for end in self.ends(name)], key=rows)
            found.append(sampled)
        return self.trial_config(choose(found, key=rows))

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
        told: dict[Value, int] = dict.fromkeys(
            (v for v in asked if isinstance(v, int | float) and distribution.holds(v)), 1
        )
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
