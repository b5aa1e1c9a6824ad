"""The space file: one YAML file is one study.

    study:      how to search                      (StudyConfig)
    trial:      settings of every trial; any of them may be a distribution
    resources:  what one trial gets                (ResourceConfig)

A distribution is `{choice: [a, b]}` or `{low: x, high: y}` with `log: true` or `step: s` if wanted. Nothing here
imports torch, Ray or Optuna, so that a space file is checked in a moment.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from bilora_ray.config import Float, Int, Settings, TrialConfig, applies, build, coerce, is_integer, is_number
from bilora_ray.errors import UserError, nearest
from bilora_ray.paths import absolute_sources

Value = bool | int | float | str | None
SECTIONS = ("study", "trial", "resources")
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What PyYAML raises: its own errors, and Python's on values such as the date 2024-02-30.
YAML_ERRORS = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


def _one_value(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be one number, text, true, false or null")
    return value


OneValue = Annotated[Value, BeforeValidator(_one_value)]


class StudyConfig(Settings):
    """How a study searches."""

    name: str = Field(description="name of the study and of its folder: letters, digits, '.', '_' and '-'")
    project: str = Field("bilora-ray", min_length=1, description="MLflow experiment that the study belongs to")
    num_trials: Int = Field(20, ge=1, description="trials to finish")
    sampler: Literal["tpe", "random"] = Field("tpe", description="how settings are proposed")
    scheduler: Literal["asha", "none"] = Field("asha", description="whether weak trials are stopped early")
    grace_period: Int | None = Field(
        None, ge=1, description="steps before the first stop; a ninth of a trial if absent"
    )
    reduction_factor: Int = Field(3, ge=2, description="at each rung one of so many trials goes on")
    seed: Int = Field(0, ge=0, lt=2**32, description="of the proposals")
    max_concurrent: Int | None = Field(None, ge=1, description="trials at one time; what the cluster holds if absent")
    points_to_evaluate: tuple[dict[str, OneValue], ...] = Field((), description="settings to try first")

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not STUDY_NAME.fullmatch(value):
            raise ValueError("must be up to 100 letters, digits, '.', '_' or '-', the first a letter or a digit")
        return value


class ResourceConfig(Settings):
    """What one trial gets of the cluster."""

    cpus_per_worker: Float = Field(1, gt=0, description="CPU cores")
    gpus_per_worker: Float = Field(0, ge=0, description="GPUs; a fraction shares one")


class Choice(Settings):
    """One of several values."""

    choice: tuple[OneValue, ...] = Field(min_length=1)

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
        return self.choice


class Range(Settings):
    """Numbers from `low` to `high`, both included; on a log scale or in steps if asked."""

    low: Float
    high: Float
    log: bool = False
    step: Float | None = Field(None, gt=0)

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

    def holds(self, value: float) -> bool:
        """Whether `value` can be drawn."""
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def ends(self) -> Sequence[Value]:
        """The values that must be allowed for the setting if every value is to be."""
        return (self.low, self.high)


Distribution = Choice | Range


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
    """

    path: Path
    study: StudyConfig
    resources: ResourceConfig
    fixed: dict[str, Any]
    distributions: dict[str, Distribution]
    points_to_evaluate: tuple[dict[str, Value], ...]

    def trial_config(self, sampled: Mapping[str, Value]) -> TrialConfig:
        """The settings of the trial that got `sampled`; UserError if they do not go together."""
        return build(TrialConfig, {**self.fixed, **sampled}, f"{self.path}: trial")

    def asked(self, setting: str, sampled: Mapping[str, Value]) -> bool:
        """Whether `setting` matters once `sampled` holds the method."""
        method = sampled.get("method", self.fixed.get("method", TrialConfig.model_fields["method"].default))
        return applies(setting, str(method))


def load_space(path: Path | None, overrides: Sequence[str] = ()) -> Space:
    """Read and check a space file.

    Args:
        path: the YAML file. Relative paths in it start at its folder. None: `overrides` say all.
        overrides: `key=value` texts; a bare key is a trial's setting, `study.key` and `resources.key` the others'.
            The value is YAML; relative paths in it start at the current folder.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    sections = {name: {} for name in SECTIONS} if path is None else _read_sections(path)
    path = path or Path("--set")
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for override in overrides:
        section, key, value = _parse_override(override)
        given[section][key] = value
    kept = {key: value for key, value in sections["trial"].items() if key not in given["trial"]}
    trial = {
        **absolute_sources(kept, path.resolve().parent, f"{path}: trial"),
        **absolute_sources(given["trial"], Path.cwd(), "--set trial"),
    }
    study = build(StudyConfig, {**sections["study"], **given["study"]}, f"{path}: study")
    resources = build(ResourceConfig, {**sections["resources"], **given["resources"]}, f"{path}: resources")
    distributions = {key: _distribution(path, key, value) for key, value in trial.items() if isinstance(value, dict)}
    distributions = dict(sorted(distributions.items(), key=lambda item: item[0] != "method"))
    fixed = {key: value for key, value in trial.items() if key not in distributions}
    if "points_to_evaluate" in given["study"]:
        points = _points(study, Path.cwd(), path, distributions)
    else:
        points = _points(study, path.resolve().parent, path, distributions, replaced=given["trial"])
    space = Space(path, study, resources, fixed, distributions, points)
    _check_settings(space)
    return space


def _read_sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{line}: not valid YAML ({problem})") from None
    if content is None:
        raise UserError(f"{path}: is empty; a space file has the sections {', '.join(SECTIONS)}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold the sections {', '.join(SECTIONS)}, not a {type(content).__name__}")
    for name, section in content.items():
        if name not in SECTIONS:
            raise UserError(f"{path}: unknown section '{name}'; {_section_hint(str(name))}")
        if not isinstance(section, dict):
            raise UserError(f"{path}: section '{name}' must hold `key: value` lines, got {section!r}")
    for name in ("study", "trial"):
        if name not in content:
            raise UserError(f"{path}: section '{name}' is missing")
    return {name: {str(key): value for key, value in content.get(name, {}).items()} for name in SECTIONS}


def _section_hint(name: str) -> str:
    if name in TrialConfig.model_fields:
        return f"'{name}' belongs under 'trial:'"
    return nearest(name, SECTIONS)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def _parse_override(text: str) -> tuple[str, str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: must be key=value")
    section, dot, name = key.partition(".")
    if not dot:
        section, name = "trial", key
    if section not in SECTIONS:
        raise UserError(f"--set {text}: unknown section '{section}'; {nearest(section, SECTIONS)}")
    try:
        return section, name, yaml.safe_load(value)
    except YAML_ERRORS:
        raise UserError(f"--set {text}: the value is not valid YAML") from None


def _distribution(path: Path, key: str, value: dict[str, Any]) -> Distribution:
    where = f"{path}: trial.{key}"
    if key not in TrialConfig.model_fields:
        raise UserError(f"{path}: trial: unknown key '{key}'; {nearest(key, TrialConfig.model_fields)}")
    if "choice" in value:
        choice = build(Choice, value, where).choice
        return Choice(choice=tuple(coerce(key, item, where) for item in choice))
    if "low" in value or "high" in value:
        found = build(Range, value, where)
        if not is_number(key):
            raise UserError(f"{where}: takes no numbers, so its distribution is {{choice: [...]}}, got {value}")
        if is_integer(key) and found.step is not None and not found.step.is_integer():
            raise UserError(f"{where}: step must be a whole number, got {found.step:g}")
        return found
    unquoted = all(item is None for item in value.values())
    hint = "; a text that starts with a brace needs quotes" if unquoted else ""
    raise UserError(f"{where}: a distribution is {{choice: [...]}} or {{low: ..., high: ...}}, got {value}{hint}")


def _check_settings(space: Space) -> None:
    """Refuse a space of which any trial could be refused: both ends of every range, every choice."""
    sampled = {key: distribution.ends()[0] for key, distribution in space.distributions.items()}
    space.trial_config(sampled)
    for key, distribution in space.distributions.items():
        for value in distribution.ends():
            space.trial_config({**sampled, key: value})


def _points(
    study: StudyConfig,
    base: Path,
    path: Path,
    distributions: Mapping[str, Distribution],
    replaced: Container[str] = (),
) -> tuple[dict[str, Value], ...]:
    """The points to evaluate, checked, less the values that no longer fit a setting that `--set` replaced."""
    points = []
    for index, point in enumerate(study.points_to_evaluate):
        where = f"{path}: study.points_to_evaluate[{index}]"
        values = {}
        for key, text in absolute_sources(point, base, where).items():
            if key not in distributions and key not in replaced:
                raise UserError(f"{where}: '{key}' has no distribution; {nearest(key, distributions)}")
            value = coerce(key, text, f"{where}.{key}")
            if key in distributions and _contains(distributions[key], value):
                values[key] = value
            elif key not in replaced:
                raise UserError(f"{where}.{key}: {value!r} is outside its distribution")
        if values:
            points.append(values)
    return tuple(points)


def _contains(distribution: Distribution, value: Value) -> bool:
    if isinstance(distribution, Choice):
        return value in distribution.choice
    return isinstance(value, int | float) and distribution.holds(value)
