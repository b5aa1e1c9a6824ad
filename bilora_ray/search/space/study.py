"""How a study searches, and what its trials get: the sections `study` and `resources` of a space file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from bilora_ray.checking import Float, Int, Settings
from bilora_ray.search.space.parts import OneValue

# What a search may use, beside its number of trials.
BUDGETS = ("max_hours", "max_device_hours", "max_cost", "price_per_gpu_hour", "target", "min_gain")
# The units of rungs of which a part is enough.
PARTED = frozenset({"epochs", "seconds"})
# The settings that only some schedulers read.
READ_BY = {
    "rung_unit": ("asha", "hyperband", "median", "pbt"),
    "grace_period": ("asha", "hyperband", "median", "pbt"),
    "reduction_factor": ("asha", "hyperband"),
    "min_trials": ("median",),
    "population": ("pbt",),
}
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What the study of a study's finalists is called.
FINALISTS_OF = "{}-finalists"
# The same, of the runs of a comparison.
RUNS_OF = "{}-runs"
# On so many seeds each of them is trained, if the study does not say.
SEEDS = 3
# A limit of a study -> the metric that must not be above it.
LIMITED = {"max_adapter_mb": "adapter_mb", "max_memory_gb": "gpu_memory_gib"}


def _of_a_folder(name: str) -> str:
    if not STUDY_NAME.fullmatch(name):
        raise ValueError("must be up to 100 letters, digits, '.', '_' or '-', the first a letter or a digit")
    return name


# What names a study, and so its folder.
StudyName = Annotated[str, AfterValidator(_of_a_folder)]


class ObjectiveConfig(Settings):
    """One of the things that a study looks for."""

    metric: str = Field(description="what an evaluation tells, such as eval_loss or train_runtime")
    mode: Literal["min", "max"] | None = Field(None, description="which is better, as a check: each metric has its own")


class StudyConfig(Settings):
    """How a study searches."""

    name: StudyName = Field(description="name of the study and of its folder: letters, digits, '.', '_' and '-'")
    project: str = Field("bilora-ray", min_length=1, description="MLflow experiment that the study belongs to")
    num_trials: Int = Field(20, ge=1, description="trials to finish")
    sampler: Literal["tpe", "gp", "cmaes", "random", "grid", "qmc", "nsga2", "nsga3"] = Field(
        "tpe",
        description="how settings are proposed: tpe learns, of any space; gp from few trials; cmaes over many, of "
        "numbers only; random; grid runs each combination once; qmc fills the space evenly; nsga2 and nsga3 are for "
        "several objectives",
    )
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = Field(
        "asha",
        description="whether weak trials are stopped early; with pbt others go on from the checkpoints of the best "
        "instead, with settings near theirs",
    )
    rung_unit: Literal["steps", "epochs", "rows", "tokens", "seconds"] | None = Field(
        None,
        description="what trials are compared after as much of, and what grace_period is in; rows if absent, with "
        "grace_period in steps of the largest batch that is searched",
    )
    grace_period: Int | Float | None = Field(
        None,
        gt=0,
        description="how much of rung_unit comes before the first stop. If absent, a quarter of a trial, with several "
        "objectives a ninth; with a reduction_factor of 3 or more that part of it for asha with one objective, else "
        "that part squared",
    )
    reduction_factor: Int | None = Field(
        None,
        ge=2,
        description="at each rung one of so many trials goes on; if absent, of two, with several objectives of three",
    )
    min_trials: Int = Field(5, ge=1, description="median: complete trials to compare with, at the least")
    population: Int = Field(
        8,
        ge=4,
        description="pbt: at each grace_period the best quarter of so many trials lend their checkpoints; the worst "
        "quarter of all that have come there end",
    )
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
    finalists: Int = Field(
        0, ge=0, description="best trials that fresh seeds are to judge after the search, beside its budgets; 0: none"
    )
    finalist_seeds: Int | None = Field(
        None, ge=2, description="trainings of each finalist, each with a seed that no trial had; 3 if absent"
    )
    keep_adapters: Int | None = Field(
        None, ge=1, description="best trials whose adapters are kept, beside the finalists'; all if absent"
    )
    max_disk_gb: Float | None = Field(
        None,
        gt=0,
        description="what the study's folder may hold: beyond it the worst adapters go, then no trial begins; that of "
        "its finalists may hold as much, and loses none",
    )
    warm_start: tuple[str, ...] = Field((), description="earlier studies, from whose best trials the search starts")

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
        if self.finalists and len(self.objectives) > 1:
            raise ValueError("finalists: are of one objective; of several there is no single winner")
        if self.finalists and not STUDY_NAME.fullmatch(FINALISTS_OF.format(self.name)):
            raise ValueError(f"name: is too long for the study of its finalists, {FINALISTS_OF.format('NAME')}")
        return self

    @model_validator(mode="after")
    def _trained_alike(self) -> StudyConfig:
        if self.scheduler == "pbt" and self.finalists:
            raise ValueError("finalists: trials of pbt change settings amid their training, as no fresh seed would")
        if self.scheduler == "pbt" and self.sampler == "grid":
            raise ValueError("scheduler: with pbt not each number is a combination, as with grid; use another sampler")
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
