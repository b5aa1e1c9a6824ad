"""Reading a space file, with `--set` on top: every mistake is one line that names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bilora_ray.checking import build, nearest_setting
from bilora_ray.config import (
    COSTS,
    FACTS,
    SOURCES,
    TrialConfig,
    coerce,
    deciding_the_draw,
    deciding_the_split,
    is_integer,
    is_number,
    objective,
    of_other_sources,
    takes_mapping,
)
from bilora_ray.errors import UserError, nearest
from bilora_ray.paths import Locate, locate_here
from bilora_ray.search.space import READ_BY, Choice, Distribution, Range, ResourceConfig, Space, StudyConfig, Value

SECTIONS = ("study", "trial", "resources")
# Trials that differ in these cannot be compared: they are judged by other rows, another measure or at other steps.
NOT_SEARCHED = frozenset(key for key, facts in FACTS.items() if not facts.searched)
GPU_MEMORY = "gpu_memory_gib"
# What can search for several objectives.
ABLE_OF_SEVERAL = {"sampler": ("tpe", "random", "gp", "nsga2", "nsga3", "qmc", "grid"), "scheduler": ("asha", "none")}
# The samplers that go through the whole space, whatever is believed of it.
WITHOUT_PRIOR = frozenset({"grid", "qmc"})
MERGE = "tag:yaml.org,2002:merge"
# What PyYAML raises: its own errors, and Python's on values such as the date 2024-02-30.
YAML_ERRORS = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML asks for it."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:  # which may stand beside what it brings
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_space(path: Path | None, overrides: Sequence[str] = (), locate: Locate = locate_here) -> Space:
    """Read and check a space file.

    Args:
        path: the YAML file. Relative paths in it start at its folder. None: `overrides` say all.
        overrides: `key=value` texts; a bare key is a trial's setting, `study.key` and `resources.key` the others'.
            The value is YAML; relative paths in it start at the current folder.
        locate: how a model or data file is found.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    sections = {} if path is None else _read_sections(path)
    return checked_space(sections, path or Path("--set"), overrides, locate)


def checked_space(
    sections: Mapping[str, Mapping[str, Any]], path: Path, overrides: Sequence[str], locate: Locate = locate_here
) -> Space:
    """As `load_space`, of `sections` that are read already; `path` says where, for errors."""
    sections = {name: dict(sections.get(name, {})) for name in SECTIONS}
    given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for override in overrides:
        section, key, value = parse_override(override)
        given[section][key] = value
    merged = of_other_sources(sections["trial"], given["trial"])
    kept = {key: value for key, value in merged.items() if key not in given["trial"]}
    trial = {
        **absolute_sources(kept, path.resolve().parent, f"{path}: trial", locate),
        **absolute_sources(given["trial"], Path.cwd(), "--set trial", locate),
    }
    study = build(StudyConfig, {**sections["study"], **given["study"]}, f"{path}: study", given["study"])
    _check_scheduler(study, sections["study"], given["study"], path)
    of_resources = {**sections["resources"], **given["resources"]}
    resources = build(ResourceConfig, of_resources, f"{path}: resources", given["resources"])
    distributions = {
        key: _distribution("--set trial" if key in given["trial"] else f"{path}: trial", key, value)
        for key, value in trial.items()
        if isinstance(value, dict) and not takes_mapping(key)
    }
    distributions = dict(sorted(distributions.items(), key=lambda item: item[0] != "method"))
    fixed = {key: value for key, value in trial.items() if key not in distributions}
    if "points_to_evaluate" in given["study"]:
        points = _points(study, Path.cwd(), Path("--set"), distributions, locate)
    else:
        points = _points(study, path.resolve().parent, path, distributions, locate, replaced=given["trial"])
    space = Space(path, study, resources, fixed, distributions, points, frozenset(given["trial"]))
    _check_settings(space)
    _check_split(space)
    _check_objectives(space)
    if study.objectives:
        space = replace(space, fixed={**space.fixed, "metric": study.objectives[0].metric})
    check_priors(space)
    return space


def _read_sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = _Loader(path.read_text(encoding="utf-8")).get_single_data()
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
    for section, kind in (("trial", TrialConfig), ("study", StudyConfig), ("resources", ResourceConfig)):
        if name in kind.model_fields:
            return f"'{name}' belongs under '{section}:'"
    return nearest(name, SECTIONS)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def absolute_sources(
    settings: Mapping[str, Any], base: Path, where: str, locate: Locate = locate_here
) -> dict[str, Any]:
    """`settings` with every local path among the SOURCES made absolute, starting at `base`.

    A trial runs in a folder of its own and a cluster's node in another package folder, so local paths become
    absolute here, once, while Hub names and `builtin:` names stay as they are. A choice of sources is treated value
    by value.

    Raises:
        UserError: a text that is neither an existing path nor can be a Hub name, or a path that cannot be looked at.
    """
    result = dict(settings)
    for key, kind in SOURCES.items():
        value = result.get(key)
        if isinstance(value, str):
            result[key] = locate(value, base, f"{where}.{key}", kind != "model")
        elif isinstance(value, dict) and isinstance(value.get("choice"), list):
            choice = [absolute_sources({key: v}, base, where, locate)[key] for v in value["choice"]]
            result[key] = {**value, "choice": choice}
    return result


def parse_override(text: str) -> tuple[str, str, Any]:
    """Section, key and value of a `--set` text. UserError if it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: must be key=value")
    section, dot, name = key.partition(".")
    if not dot:
        section, name = "trial", key
        for other, kind in (("study", StudyConfig), ("resources", ResourceConfig)):
            if key in kind.model_fields and key not in TrialConfig.model_fields:
                raise UserError(f"--set {text}: write {other}.{key}")
    if section not in SECTIONS:
        raise UserError(f"--set {text}: unknown section '{section}'; {nearest(section, SECTIONS)}")
    try:
        node = yaml.compose(value, _Loader)
        parsed = _Loader(value).get_single_data()
    except YAML_ERRORS:
        raise UserError(f"--set {text}: the value is not valid YAML") from None
    if value.strip() and (node is None or node.end_mark.index < len(value.rstrip())):
        # YAML takes the rest for a comment, which nobody writes in an argument.
        raise UserError(f"--set {text}: a text with # needs quotes: {key}={json.dumps(value)}")
    return section, name, parsed


def _distribution(section: str, key: str, value: dict[str, Any]) -> Distribution:
    where = f"{section}.{key}"
    if key not in TrialConfig.model_fields:
        raise UserError(f"{section}: unknown key '{key}'; {nearest_setting(key, TrialConfig)}")
    begun = bool(value.keys() & {"choice", "low", "high"})
    if value and not begun and all(item is None for item in value.values()):  # {answer} is a mapping to YAML
        braces = "{" + ", ".join(map(str, value)) + "}"
        raise UserError(f'{where}: a text that starts with a brace needs quotes: "{braces}"')
    if key in NOT_SEARCHED:
        raise UserError(f"{where}: must have one value: trials that differ in it cannot be compared")
    if "choice" in value:
        choice = build(Choice, value, where).choice
        if key == "precision" and "auto" in choice:
            raise UserError(f"{where}: auto is the one or the other, so a choice is among bf16 and fp32")
        return Choice(choice=tuple(coerce(key, item, where) for item in choice))
    if "low" in value or "high" in value:
        found = build(Range, value, where)
        if not is_number(key):
            raise UserError(f"{where}: takes no numbers, so its distribution is {{choice: [...]}}, got {value}")
        if is_integer(key) and found.step is not None and not found.step.is_integer():
            raise UserError(f"{where}: step must be a whole number, got {found.step:g}")
        return found
    raise UserError(f"{where}: a distribution is {{choice: [...]}} or {{low: ..., high: ...}}, got {value}")


def _check_scheduler(study: StudyConfig, filed: Container[str], given: Container[str], path: Path) -> None:
    """Refuse a setting that the scheduler does not read; of a file, only if the scheduler is the file's, too."""
    for key, schedulers in READ_BY.items():
        if study.scheduler not in schedulers and (key in given or (key in filed and "scheduler" not in given)):
            where, readers = "--set study" if key in given else f"{path}: study", ", ".join(schedulers)
            raise UserError(f"{where}.{key}: scheduler {study.scheduler} does not read it; allowed with {readers}")


def _check_settings(space: Space) -> None:
    """Refuse a space of which any trial could be refused: both ends of every range, every choice."""
    sampled = {key: distribution.ends()[0] for key, distribution in space.distributions.items()}
    _check_parallelism(space, space.trial_config(sampled))
    for key, distribution in space.distributions.items():
        for value in distribution.ends():
            _check_parallelism(space, space.trial_config({**sampled, key: value}))


def _check_parallelism(space: Space, config: TrialConfig) -> None:
    if space.resources.parallelism == "fsdp" and config.whole_only is not None:
        raise UserError(f"{space.path}: trial.{config.whole_only}")


def _check_split(space: Space) -> None:
    """Refuse a space whose trials would hold out different rows."""
    for key in space.distributions:
        if key in deciding_the_split(space.fixed):
            needed = "split_seed or validation_data" if key == "seed" else "validation_data"
            raise UserError(f"{space.path}: trial.{key}: needs {needed}, or trials would hold out other rows")


def _check_objectives(space: Space) -> None:
    """Refuse objectives and limits that no evaluation tells, or that this sampler or scheduler cannot take."""
    study, where, seen = space.study, f"{space.path}: study", set[str]()
    chosen_by = space.first_config().available_metrics
    for index, one in enumerate(study.objectives):
        here, told = f"{where}.objectives[{index}]", (*chosen_by, *COSTS)
        if one.metric not in told:
            raise UserError(f"{here}: no evaluation tells '{one.metric}'; {nearest(one.metric, told)}")
        if index == 0 and one.metric not in chosen_by:
            allowed = ", ".join(chosen_by)
            raise UserError(
                f"{here}: {one.metric} cannot choose a trial's adapter, as the first does; one of {allowed}"
            )
        if one.metric in seen:
            raise UserError(f"{here}: {one.metric} is there already")
        better = "max" if objective(one.metric).greater_is_better else "min"
        if one.mode not in (None, better):
            raise UserError(f"{here}: mode of {one.metric} is {better}, got {one.mode}")
        seen.add(one.metric)
    first, metric = next((one.metric for one in study.objectives), None), space.fixed.get("metric")
    if first is not None and metric not in (None, first):
        raise UserError(f"{where}.objectives: the first is {first}, and trial.metric is {metric}; leave one out")
    if not space.resources.gpus_per_worker and (GPU_MEMORY in seen or study.max_memory_gb is not None):
        key = "objectives" if GPU_MEMORY in seen else "max_memory_gb"
        raise UserError(f"{where}.{key}: {GPU_MEMORY} is known on GPUs only, and resources.gpus_per_worker is 0")
    for key, able in ABLE_OF_SEVERAL.items() if len(seen) > 1 else ():
        if (word := getattr(study, key)) not in able:
            raise UserError(f"{where}.{key}: {word} takes one objective; of several, allowed: {', '.join(able)}")


def check_priors(space: Space) -> None:
    """Refuse a prior where all trials are settled without one."""
    if space.study.sampler in WITHOUT_PRIOR:
        for key, distribution in space.distributions.items():
            if isinstance(distribution, Range) and distribution.prior is not None:
                raise UserError(f"{space.path}: trial.{key}: {space.study.sampler} heeds no prior; tpe and random do")


def check_draw(space: Space) -> None:
    """Refuse a space whose trials would draw different rows to be measured on.

    Whether they draw is known once it is known whether a study of a version goes on that did not.
    """
    for key in space.distributions:
        if key in deciding_the_draw(space.fixed):
            needed = "split_seed or stratify: false" if key == "seed" else "stratify: false"
            raise UserError(f"{space.path}: trial.{key}: needs {needed}, or max_eval_samples would draw other rows")


def _points(
    study: StudyConfig,
    base: Path,
    path: Path,
    distributions: Mapping[str, Distribution],
    locate: Locate,
    replaced: Container[str] = (),
) -> tuple[dict[str, Value], ...]:
    """The points to evaluate, checked, less the values that no longer fit a setting that `--set` replaced."""
    points = []
    for index, point in enumerate(study.points_to_evaluate):
        where = f"{path}: study.points_to_evaluate[{index}]"
        values = {}
        for key, text in absolute_sources(point, base, where, locate).items():
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
