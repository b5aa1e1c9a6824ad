"""What a space file says, checked: one file is one study.

    study:      how to search                      (StudyConfig)
    trial:      settings of every trial; any of them may be a distribution
    resources:  what one trial gets                (ResourceConfig)

A distribution is `{choice: [a, b]}` or `{low: x, high: y}` with `log: true` or `step: s` if wanted, and with
`prior: {mean: m, sigma: 2x}` if something is known of it beforehand. Nothing here imports torch, Ray or Optuna, so that
a space file is checked in a moment. `space_file` reads one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from bilora_ray.checking import Float, Int, Settings, build
from bilora_ray.config import TrialConfig, applies, coerce, objective
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


OneValue = Annotated[Value, BeforeValidator(_one_value)]


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
    max_adapter_mb: Float | None = Field(None, gt=0, description="MB (10^6 bytes) that an adapter may have")
    max_memory_gb: Float | None = Field(
        None, gt=0, description="GiB of a GPU that a worker's torch may take, as gpu_memory_gib tells it"
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


class Choice(Settings):
    """One of several values."""

    choice: tuple[OneValue, ...] = Field(min_length=1)

    def __str__(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.choice)

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
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


class Range(Settings):
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

    def __str__(self) -> str:
        scale = ", on a log scale" if self.log else ""
        step = f", in steps of {self.step:.10g}" if self.step else ""
        prior = f", {self.prior}" if self.prior else ""
        return f"{self.low:.10g} to {self.high:.10g}{scale}{step}{prior}"

    def holds(self, value: float) -> bool:
        """Whether `value` can be drawn."""
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
        return (self.low, self.high)


Distribution = Choice | Range
# A limit of a study -> the metric that must not be above it.
LIMITED = {"max_adapter_mb": "adapter_mb", "max_memory_gb": "gpu_memory_gib"}


@dataclass(frozen=True)
class Space:
    """A checked space file.

    Attributes:
        path: the file.
        study: how to search.
        resources: what one trial gets.
        fixed: settings that all trials share.
        distributions: setting -> Choice or Range, in the file's order, `method` first.
        points_to_evaluate: settings to try first, each inside its distribution.
        overridden: the trial's settings that are not the file's, for errors.
    """

    path: Path
    study: StudyConfig
    resources: ResourceConfig
    fixed: dict[str, Any]
    distributions: dict[str, Distribution]
    points_to_evaluate: tuple[dict[str, Value], ...]
    overridden: frozenset[str] = frozenset()

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What trials are judged by; the first chooses each trial's adapter."""
        metric = str(self.fixed.get("metric", TrialConfig.model_fields["metric"].default))
        return tuple(objective(one.metric) for one in self.study.objectives) or (objective(metric),)

    def trial_config(self, sampled: Mapping[str, Value]) -> TrialConfig:
        """The settings of the trial that got `sampled`; UserError if they do not go together."""
        return build(TrialConfig, {**self.fixed, **sampled}, f"{self.path}: trial", self.overridden)

    def first_config(self) -> TrialConfig:
        """The settings of a trial that gets the first choice, or the low end, of every distribution."""
        return self.trial_config({key: distribution.ends()[0] for key, distribution in self.distributions.items()})

    def with_step(self, choose: Callable[..., TrialConfig]) -> TrialConfig:
        """As `first_config`, of the trial whose steps take the most training rows, or the fewest: `max`, or `min`."""
        config = self.first_config()
        for key, distribution in self.distributions.items():
            others = [config.model_copy(update={key: coerce(key, end, key)}) for end in distribution.ends()]
            config = choose(others, key=lambda other: other.step_rows(self.resources.workers))
        return config

    def asked(self, setting: str, sampled: Mapping[str, Value]) -> bool:
        """Whether `setting` matters once `sampled` holds the method."""
        method = sampled.get("method", self.fixed.get("method", TrialConfig.model_fields["method"].default))
        return applies(setting, str(method))
