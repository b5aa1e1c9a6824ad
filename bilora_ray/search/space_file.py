"""Reading a space file, with `--set` on top: every mistake is one line that names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bilora_ray.checking import build, nearest_setting
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, nearest
from bilora_ray.measures import COSTS, objective
from bilora_ray.paths import Locate, locate_here
from bilora_ray.search.space import (
    READ_BY,
    Choice,
    Distribution,
    Given,
    Range,
    ResourceConfig,
    Space,
    StudyConfig,
    Value,
    When,
    is_expression,
    setting_of,
)
from bilora_ray.search.space.order import NOT_SEARCHED, ONE_VALUE, check_settings, with_parts
from bilora_ray.search.space.sense import check_sense, without_effect
from bilora_ray.settings import (
    AMID,
    SOURCES,
    coerce,
    deciding_the_draw,
    deciding_the_split,
    is_integer,
    is_number,
    of_other_sources,
    takes_mapping,
)

SECTIONS = ("study", "trial", "resources")
GPU_MEMORY = "gpu_memory_gib"
# What can search for several objectives.
ABLE_OF_SEVERAL = {"sampler": ("tpe", "random", "gp", "nsga2", "nsga3", "qmc", "grid"), "scheduler": ("asha", "none")}
# The samplers that go through the whole space, whatever is believed of it, and one that moves only by its own draws.
WITHOUT_PRIOR = frozenset({"grid", "qmc", "cmaes"})
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
    sections = {} if path is None else sections_of(read_yaml(path), path)
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
    parts: dict[str, list[Distribution | Given]] = {}
    fixed: dict[str, Any] = {}
    for key, value in trial.items():
        found = _parts("--set trial" if key in given["trial"] else f"{path}: trial", key, value)
        if isinstance(found, _Parts):
            parts[key] = found
        else:
            fixed[key] = found
    space = with_parts(Space(path, study, resources, fixed, {}, (), frozenset(given["trial"])), parts)
    if "points_to_evaluate" in given["study"]:
        points = _points(study, Path.cwd(), Path("--set"), space, locate)
    else:
        replaced = given["trial"].keys() | (parts.keys() - space.varied - space.fixed.keys())
        points = _points(study, path.resolve().parent, path, space, locate, replaced)
    check_settings(space)
    _check_split(space)
    _check_objectives(space)
    _check_changing(space)
    if study.objectives:
        space = replace(space, fixed={**space.fixed, "metric": study.objectives[0].metric})
    check_priors(space)
    check_sense(space)
    return replace(space, points_to_evaluate=points, notes=(*space.notes, *without_effect(space)))


def read_yaml(path: Path) -> object:
    """What a YAML file holds. UserError if it cannot be read, or gives a key twice."""
    try:
        content: object = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{line}: not valid YAML ({problem})") from None
    return content


def sections_of(content: object, path: Path) -> dict[str, dict[str, Any]]:
    """The sections of what a space file holds, or of a dict like it. UserError, naming `path`, if it has other ones."""
    if content is None:
        raise UserError(f"{path}: is empty; a space file has the sections {', '.join(SECTIONS)}")
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold the sections {', '.join(SECTIONS)}, not a {type(content).__name__}")
    for name, section in content.items():
        if name not in SECTIONS:
            raise UserError(f"{path}: unknown section '{name}'; {_section_hint(str(name))}")
        if not isinstance(section, Mapping):
            raise UserError(f"{path}: section '{name}' must hold `key: value` lines, got {section!r}")
    for name in ("study", "trial"):
        if name not in content:
            raise UserError(f"{path}: section '{name}' is missing")
    return {name: {str(key): value for key, value in content.get(name, {}).items()} for name in SECTIONS}


def _section_hint(name: str) -> str:
    if name in ("comparison", "methods"):
        return "`bilora-ray compare FILE` takes a comparison file, and checks it with --dry-run"
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
    by value, and so are conditions on one.

    Raises:
        UserError: a text that is neither an existing path nor can be a Hub name, or a path that cannot be looked at.
    """
    result = dict(settings)
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            result[key] = [absolute_sources({key: item}, base, where, locate)[key] for item in value]
        elif isinstance(value, dict) and not takes_mapping(key):
            result[key] = _absolute_part(key, value, base, where, locate)
        elif isinstance(value, str) and key in SOURCES:
            result[key] = locate(value, base, f"{where}.{key}", SOURCES[key] != "model")
    return result


def _absolute_part(key: str, part: Mapping[str, Any], base: Path, where: str, locate: Locate) -> dict[str, Any]:
    """As `absolute_sources`, of what the setting `key` gets, value by value, and of the values in its condition."""

    def absolute(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(key, item) for item in value]
        return absolute_sources({key: value}, base, where, locate)[key]

    result = {name: absolute(key, value) if name in ("choice", "value") else value for name, value in part.items()}
    if isinstance(part.get("when"), dict):
        result["when"] = {str(other): absolute(other, value) for other, value in part["when"].items()}
    return result


def parse_override(text: str) -> tuple[str, str, Any]:
    """Section, key and value of a `--set` text. UserError if it is none."""
    key, value = override_value(text)
    section, dot, name = key.partition(".")
    if not dot:
        section, name = "trial", key
        for other, kind in (("study", StudyConfig), ("resources", ResourceConfig)):
            if key in kind.model_fields and key not in TrialConfig.model_fields:
                raise UserError(f"--set {text}: write {other}.{key}")
    if section not in SECTIONS:
        raise UserError(f"--set {text}: unknown section '{section}'; {nearest(section, SECTIONS)}")
    return section, name, value


def override_value(text: str) -> tuple[str, Any]:
    """What stands before the equals sign of a `--set` text, and the value behind it. UserError if it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: must be key=value")
    try:
        node = yaml.compose(value, _Loader)
        parsed = _Loader(value).get_single_data()
    except YAML_ERRORS:
        raise UserError(f"--set {text}: the value is not valid YAML") from None
    if value.strip() and (node is None or node.end_mark.index < len(value.rstrip())):
        # YAML takes the rest for a comment, which nobody writes in an argument.
        raise UserError(f"--set {text}: a text with # needs quotes: {key}={json.dumps(value)}")
    return key, parsed


def _parts(section: str, key: str, value: Any) -> Any:
    """What a setting is drawn or derived from, or gets under conditions, as `_Parts`; else its value in all trials."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value) and not takes_mapping(key):
        if not all(isinstance(item, dict) for item in value):
            raise UserError(f"{section}.{key}: a list of cases holds {{..., when: ...}} only, got {value}")
        return _Parts(_part(section, key, item, f"{section}.{key}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict) and not takes_mapping(key):
        part = _part(section, key, value, f"{section}.{key}")
        if isinstance(part, Given) and not part.when and not is_expression(key, part.value):
            return part.value
        return _Parts([part])
    return _Parts([Given(value=value)]) if is_expression(key, value) else value


class _Parts(list[Distribution | Given]):
    """Tells a list of parts from one that is a setting's value."""


def _part(section: str, key: str, value: dict[str, Any], where: str) -> Distribution | Given:
    if key not in TrialConfig.model_fields:
        raise UserError(f"{section}: unknown key '{key}'; {nearest_setting(key, TrialConfig)}")
    begun = bool(value.keys() & {"choice", "low", "high", "value"})
    if value and not begun and all(item is None for item in value.values()):  # {answer} is a mapping to YAML
        braces = "{" + ", ".join(map(str, value)) + "}"
        raise UserError(f'{where}: a text that starts with a brace needs quotes: "{braces}"')
    if key in NOT_SEARCHED and not (begun and value.keys() == {"value"}):
        raise UserError(f"{where}: {ONE_VALUE}")
    if "choice" in value:
        drawn = build(Choice, value, where)
        if key == "precision" and "auto" in drawn.choice:
            raise UserError(f"{where}: auto is the one or the other, so a choice is among bf16 and fp32")
        choice = tuple(coerce(key, item, where) for item in drawn.choice)
        if twice := [value for index, value in enumerate(choice) if value in choice[:index]]:
            raise UserError(f"{where}: {twice[0]!r} is there twice")
        return Choice(choice=choice, when=_when(drawn.when, where))
    if "low" in value or "high" in value:
        found = build(Range, value, where)
        if not is_number(key):
            raise UserError(f"{where}: takes no numbers, so its distribution is {{choice: [...]}}, got {value}")
        if is_integer(key) and found.step is not None and not found.step.is_integer():
            raise UserError(f"{where}: step must be a whole number, got {found.step:g}")
        return found.model_copy(update={"when": _when(found.when, where)})
    if "value" in value:
        given = build(Given, value, where)
        plain = given.value if is_expression(key, given.value) else coerce(key, given.value, where)
        return Given(value=plain, when=_when(given.when, where))
    raise UserError(f"{where}: a distribution is {{choice: [...]}} or {{low: ..., high: ...}}, got {value}")


def _check_scheduler(study: StudyConfig, filed: Container[str], given: Container[str], path: Path) -> None:
    """Refuse a setting that the scheduler does not read; of a file, only if the scheduler is the file's, too."""
    for key, schedulers in READ_BY.items():
        said = key in given or (key in filed and "scheduler" not in given)
        changed = getattr(study, key) != StudyConfig.model_fields[key].default
        if said and changed and study.scheduler not in schedulers:
            where, readers = "--set study" if key in given else f"{path}: study", ", ".join(schedulers)
            raise UserError(f"{where}.{key}: scheduler {study.scheduler} does not read it; allowed with {readers}")


def _when(when: When, where: str) -> When:
    """The condition with the types of its settings. UserError if one is no setting, or can't have the value."""
    for key in when:
        if key not in TrialConfig.model_fields:
            raise UserError(f"{where}.when: unknown key '{key}'; {nearest_setting(key, TrialConfig)}")
    return {key: tuple(coerce(key, value, f"{where}.when.{key}") for value in values) for key, values in when.items()}


def _check_split(space: Space) -> None:
    """Refuse a space whose trials would hold out different rows."""
    for key in sorted(space.varied):
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


def _check_changing(space: Space) -> None:
    """Refuse a scheduler that changes settings amid a training where nothing is searched that may."""
    if space.study.scheduler == "pbt" and not space.changing:
        allowed = ", ".join(sorted(AMID))
        raise UserError(f"{space.path}: study.scheduler: pbt changes settings amid a training; search one of {allowed}")


def check_priors(space: Space) -> None:
    """Refuse a prior, or a warm start, where a sampler has its trials without one."""
    sampler = space.study.sampler
    if sampler in WITHOUT_PRIOR:
        for key, distribution in space.distributions.items():
            if isinstance(distribution, Range) and distribution.prior is not None:
                raise UserError(f"{space.path}: trial.{setting_of(key)}: {sampler} heeds no prior; tpe and random do")
        if space.study.warm_start:
            raise UserError(f"{space.path}: study.warm_start: {sampler} heeds no earlier study; tpe and random do")


def check_draw(space: Space) -> None:
    """Refuse a space whose trials would draw different rows to be measured on.

    Whether they draw is known once it is known whether a study of a version goes on that did not.
    """
    for key in sorted(space.varied):
        if key in deciding_the_draw(space.fixed):
            needed = "split_seed or stratify: false" if key == "seed" else "stratify: false"
            raise UserError(f"{space.path}: trial.{key}: needs {needed}, or max_eval_samples would draw other rows")


def _points(
    study: StudyConfig, base: Path, path: Path, space: Space, locate: Locate, replaced: Container[str] = ()
) -> tuple[dict[str, Value], ...]:
    """The points to evaluate, checked, less the values that no longer fit a setting that `--set` replaced."""
    points = []
    for index, point in enumerate(study.points_to_evaluate):
        where = f"{path}: study.points_to_evaluate[{index}]"
        values = {}
        for key, text in absolute_sources(point, base, where, locate).items():
            drawn = [space.distributions[name] for name in space.names_of(key)]
            if not drawn and key not in replaced:
                raise UserError(f"{where}: '{key}' has no distribution; {nearest(key, _drawn(space))}")
            value = coerce(key, text, f"{where}.{key}")
            if any(part.holds(value) for part in drawn):
                values[key] = value
            elif key not in replaced:
                raise UserError(f"{where}.{key}: {value!r} is outside its distribution")
        for key in [key for key in values if not _fits(space, key, values, where, replaced)]:
            del values[key]
        if values:
            points.append(values)
    return tuple(points)


def _fits(space: Space, key: str, point: Mapping[str, Value], where: str, replaced: Container[str]) -> bool:
    """Whether a trial that begins at `point` is asked for `key`, and may have its value there.

    It is refused if not; but where `--set` is why, it is left out.
    """
    names = space.names_of(key)
    asked = [name for name in names if space.asked(name, point)]
    if any(space.distributions[name].holds(point[key]) for name in asked):
        return True
    if key in replaced or any(other in replaced for name in names for other in (*space.parts[name].when, "method")):
        return False
    if asked:
        raise UserError(f"{where}.{key}: {point[key]!r} is outside its distribution, {space.distributions[asked[0]]}")
    conditions = [space.parts[name].condition for name in names if space.parts[name].when]
    why = f"it is asked for when {', or when '.join(conditions)}" if conditions else "the method does not read it"
    raise UserError(f"{where}.{key}: has no effect at this point: {why}")


def _drawn(space: Space) -> list[str]:
    return list(dict.fromkeys(map(setting_of, space.distributions)))
