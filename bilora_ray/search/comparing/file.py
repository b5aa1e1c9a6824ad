"""Reading a comparison file: which methods, each over its own space, at which budget, on how many seeds.

    comparison: how they are compared              (ComparisonConfig)
    trial:      settings that all share; a range here is a range of all
    resources:  what one trial gets                (ResourceConfig)
    methods:    entry -> its own settings and ranges

Every mistake is one line that names the file and the key. Nothing here imports torch, Ray or Optuna.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bilora_ray.checking import Float, Int, Settings, build, nearest_setting
from bilora_ray.config import TEST_SETTINGS, TrialConfig
from bilora_ray.errors import UserError, nearest
from bilora_ray.facts import METHOD_NAMES, MethodName
from bilora_ray.measures import SHARPNESS
from bilora_ray.paths import Locate, locate_here
from bilora_ray.search.space import RUNS_OF, STUDY_NAME, ResourceConfig, Space, setting_of
from bilora_ray.search.space.study import StudyName
from bilora_ray.search.space_file import checked_space, override_value, read_yaml
from bilora_ray.settings import FACTS, applies, takes_mapping

SECTIONS = ("comparison", "trial", "resources", "methods")
# What the study is called that tunes an entry of a comparison.
TUNED = "{}-tune-{}"
# Below so many seeds little can be told.
FEW_SEEDS = 5
# What decides how many steps a training of some epochs has.
STEPS = ("max_steps", "num_train_epochs")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
ALL_SHARE = frozenset(
    {key for key, facts in FACTS.items() if not facts.searched}
    | {key for key, facts in FACTS.items() if facts.decides in ("rows", "training rows", "model", "evaluation")}
    | {*STEPS, "early_stopping_patience", "early_stopping_threshold", "variant"}
)
RATE = "learning_rate"


class ComparisonConfig(Settings):
    """How methods are compared."""

    name: StudyName = Field(description="name of the comparison; its studies are NAME-tune-ENTRY and NAME-runs")
    project: str = Field("bilora-ray", min_length=1, description="MLflow experiment that its studies belong to")
    tune: Int = Field(8, ge=1, description="trials of each entry, over its own space, judged on the validation rows")
    seeds: Int = Field(
        10, ge=2, description="trainings of each entry with its best settings, on seeds that no trial of the tuning had"
    )
    budget: Literal["steps", "seconds"] = Field(
        "steps",
        description="what is equal: optimizer steps; or seconds of training, where each entry has as many steps as "
        "its measured time of a step leaves it of the baseline's",
    )
    baseline: str | None = Field(None, description="the entry that the others are compared with; the first if absent")
    sharpness_radius: Float | None = Field(
        0.1, gt=0, description="measure how flat each final adapter is, on the validation rows; null: not measured"
    )
    seed: Int = Field(0, ge=0, lt=2**32, description="of what is tried, and of the seeds of the runs")
    max_concurrent: Int | None = Field(None, ge=1, description="trials at one time; what the cluster holds if absent")
    price_per_gpu_hour: Float | None = Field(None, gt=0, description="of a device-hour, to tell what each entry cost")

    @model_validator(mode="after")
    def _runs_named(self) -> ComparisonConfig:
        if not STUDY_NAME.fullmatch(RUNS_OF.format(self.name)):
            raise ValueError(f"name: is too long for the study of its runs, {RUNS_OF.format('NAME')}")
        return self


@dataclass(frozen=True)
class Comparison:
    """A checked comparison file.

    Attributes:
        path: the file.
        config: how its entries are compared.
        spaces: entry -> the space that it is tuned over, with the test rows among its settings; the baseline is first.
        notes: lines about what is allowed and yet seldom meant.
    """

    path: Path
    config: ComparisonConfig
    spaces: Mapping[str, Space]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the comparison."""
        return self.config.name

    @property
    def baseline(self) -> str:
        """The entry that the others are compared with."""
        return next(iter(self.spaces))

    @property
    def runs(self) -> str:
        """The name of the study of its runs."""
        return RUNS_OF.format(self.name)

    @property
    def searched_by_all(self) -> tuple[str, ...]:
        """The settings that each entry searches; the learning rate is the first."""
        searched = [list(map(setting_of, space.distributions)) for space in self.spaces.values()]
        shared = (key for key in searched[0] if all(key in keys for keys in searched))
        return tuple(dict.fromkeys((RATE, *shared)))

    def mapped(self, spaces: Mapping[str, Space]) -> Comparison:
        """The same with other `spaces` of the same entries."""
        return replace(self, spaces=dict(spaces))


def tuned_without_test(space: Space) -> Space:
    """`space` without the test rows: no trial reads them, and so no study of trials names them."""
    return replace(space, fixed={key: value for key, value in space.fixed.items() if key not in TEST_SETTINGS})


def load_comparison(path: Path, overrides: Sequence[str] = (), locate: Locate = locate_here) -> Comparison:
    """Read and check a comparison file.

    Args:
        path: the YAML file. Relative paths in it start at its folder.
        overrides: `key=value` texts; a bare key is a setting that all share, `comparison.key`, `resources.key` and
            `methods.entry.key` the others'.
        locate: how a model or data file is found.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    return checked_comparison(sections_of(read_yaml(path), path), path, overrides, locate)


def sections_of(content: object, path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a comparison file, or of a dict like it. UserError, naming `path`, if it has others."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold the sections {', '.join(SECTIONS)}, not {_kind(content)}")
    for name, section in content.items():
        if name not in SECTIONS:
            hint = "`bilora-ray tune` takes a space file" if name == "study" else nearest(str(name), SECTIONS)
            raise UserError(f"{path}: unknown section '{name}'; {hint}")
        if not isinstance(section, Mapping):
            raise UserError(f"{path}: section '{name}' must hold `key: value` lines, got {section!r}")
    for name in ("comparison", "trial", "methods"):
        if name not in content:
            raise UserError(f"{path}: section '{name}' is missing")
    found = {name: {str(key): value for key, value in content.get(name, {}).items()} for name in SECTIONS}
    for entry, settings in found["methods"].items():
        if settings is not None and not isinstance(settings, Mapping):
            raise UserError(f"{path}: methods.{entry}: must hold `key: value` lines, got {settings!r}")
    found["methods"] = {entry: dict(settings or {}) for entry, settings in found["methods"].items()}
    return found


def checked_comparison(
    sections: Mapping[str, Mapping[str, Any]], path: Path, overrides: Sequence[str], locate: Locate = locate_here
) -> Comparison:
    """As `load_comparison`, of `sections` that are read already; `path` says where, for errors."""
    entries: dict[str, dict[str, Any]] = {entry: dict(own) for entry, own in sections["methods"].items()}
    given = _by_section(overrides, entries)
    said = {key: override_value(text)[1] for key, text in given.pop("comparison", {}).items()}
    config = build(ComparisonConfig, {**sections["comparison"], **said}, f"{path}: comparison", said)
    _check_names(path, config, entries)
    told = {key: override_value(text)[1] for key, text in given.get("trial", {}).items()}
    shared = {**sections["trial"], **told}
    _check_shared(path, shared)
    first = config.baseline or next(iter(entries))
    spaces = {
        entry: _space(_Entry(path, entry, config, entries[entry], sections, given, shared), locate)
        for entry in (first, *(other for other in entries if other != first))
    }
    _check_read(path, sections["trial"], given, spaces, entries)
    notes = [f"{entry}: {note}" for entry, space in spaces.items() for note in space.notes]
    notes += _of_sharpness(config, spaces)
    notes += _of_numbers(spaces)
    if config.seeds < FEW_SEEDS:
        notes.append(f"seeds: of {config.seeds} little can be told; {FEW_SEEDS} or more tell apart what differs much")
    return Comparison(path, config, spaces, tuple(notes))


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"


def _by_section(overrides: Sequence[str], entries: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Section, of an entry `methods.entry` -> key -> the text `key=value`. UserError of a section that is none."""
    found: dict[str, dict[str, str]] = {}
    for text in overrides:
        name, value = override_value(text)[0], text.partition("=")[2]
        section, dot, key = name.rpartition(".")
        if not dot:
            section = "trial"
            for other, kind in (("comparison", ComparisonConfig), ("resources", ResourceConfig)):
                if key in kind.model_fields and key not in TrialConfig.model_fields:
                    raise UserError(f"--set {text}: write {other}.{key}")
        if section == "methods":
            raise UserError(f"--set {text}: write methods.ENTRY.KEY=VALUE, of the entries {', '.join(entries)}")
        entry = section.removeprefix("methods.")
        if section not in ("comparison", "trial", "resources") and (section == entry or entry not in entries):
            hint = nearest(entry, entries) if section != entry else nearest(section, SECTIONS)
            raise UserError(f"--set {text}: unknown section '{section}'; {hint}")
        found.setdefault(section, {})[key] = f"{key}={value}"
    return found


def _check_names(path: Path, config: ComparisonConfig, entries: Mapping[str, Any]) -> None:
    where = f"{path}: methods"
    if len(entries) < 2:
        raise UserError(f"{where}: has {len(entries)} entries, and a comparison is of two or more")
    if config.baseline is not None and config.baseline not in entries:
        hint = nearest(config.baseline, entries)
        raise UserError(f"{path}: comparison.baseline: '{config.baseline}' is no entry of methods; {hint}")
    for entry in entries:
        if not STUDY_NAME.fullmatch(entry):
            raise UserError(f"{where}: '{entry}' must be letters, digits, '.', '_' or '-', as it names a study")
        if not STUDY_NAME.fullmatch(name := TUNED.format(config.name, entry)):
            raise UserError(f"{where}.{entry}: is too long for the study of its tuning, {name}")


def _check_shared(path: Path, trial: Mapping[str, Any]) -> None:
    """Refuse in what all share what each entry has for itself, and what no trials that are compared may differ in."""
    where = f"{path}: trial"
    if "method" in trial:
        raise UserError(f"{where}.method: each entry of methods has its own")
    for key, value in trial.items():
        if key == "variant":
            raise UserError(f"{where}.variant: the entries of methods name it")
        if key in ALL_SHARE and _is_drawn(key, value):
            raise UserError(f"{where}.{key}: must have one value, or the entries could not be compared")
        if key in BATCH and _is_drawn(key, value) and trial.get("max_steps") is None:
            raise UserError(f"{where}.{key}: needs trial.max_steps, or trials would differ in their number of steps")
    if trial.get("metric") == SHARPNESS:
        hint = "comparison.sharpness_radius has it measured beside what the test rows say"
        raise UserError(f"{where}.metric: {SHARPNESS} is of validation rows, which choose; {hint}")
    if not any(trial.get(key) is not None for key in TEST_SETTINGS[:2]):
        raise UserError(f"{where}: test_data is missing: rows that all are scored on once, and that choose nothing")


@dataclass(frozen=True)
class _Entry:
    """What there is to read of an entry of methods; `shared` is what all have, with what `given` says of that."""

    path: Path
    name: str
    config: ComparisonConfig
    own: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]
    given: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, Any]

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"{self.path}: methods.{self.name}"

    @property
    def overrides(self) -> dict[str, str]:
        """Key -> the text of `--set` that is of this entry alone."""
        return dict(self.given.get(f"methods.{self.name}", {}))

    @property
    def settings(self) -> dict[str, Any]:
        """Its own settings, with `--set`."""
        return {**self.own, **{key: override_value(text)[1] for key, text in self.overrides.items()}}


def _space(entry: _Entry, locate: Locate) -> Space:
    """The space that an entry is tuned over."""
    method, own = _method(entry), entry.settings
    for key in own:
        _check_own(entry, key, method)
    shared = {key: value for key, value in entry.sections["trial"].items() if _reads(key, method) and key not in own}
    told = {key: text for key, text in entry.given.get("trial", {}).items() if _reads(key, method) and key not in own}
    texts = [f"trial.{text}" for text in (*told.values(), *entry.overrides.values())]
    texts += [f"resources.{text}" for text in entry.given.get("resources", {}).values()]
    asked = entry.config.model_dump(include={"project", "seed", "max_concurrent"})
    plain = {"num_trials": entry.config.tune, "sampler": "qmc", "scheduler": "none"}
    sections = {
        "study": {"name": TUNED.format(entry.config.name, entry.name), **asked, **plain},
        "trial": {**shared, **entry.own, "method": method},
        "resources": entry.sections["resources"],
    }
    with _naming(entry, own):
        space = checked_space(sections, entry.path, texts, locate)
    if not space.names_of(RATE):
        raise UserError(f"{entry.where}.{RATE}: has no range; gains of methods vanish where each has not its own rate")
    return space


def _method(entry: _Entry) -> MethodName:
    method = entry.settings.get("method", entry.name)
    if not isinstance(method, str):
        raise UserError(f"{entry.where}.method: must be one method; of several make an entry each")
    if method not in METHOD_NAMES:
        hint = nearest(method, METHOD_NAMES)
        if "method" in entry.settings:
            raise UserError(f"{entry.where}.method: '{method}' is no method; {hint}")
        raise UserError(f"{entry.where}: '{method}' is no method, and the entry says no other; {hint}")
    return method


def _check_own(entry: _Entry, key: str, method: str) -> None:
    """Refuse a setting of an entry that is none, that is for all, or that its method does not read."""
    if key not in TrialConfig.model_fields:
        raise UserError(f"{entry.where}: unknown key '{key}'; {nearest_setting(key, TrialConfig)}")
    if key in ALL_SHARE and key != "method":
        raise UserError(f"{entry.where}.{key}: is for all entries alike; write trial.{key}")
    if key in BATCH and entry.shared.get("max_steps") is None:
        raise UserError(f"{entry.where}.{key}: needs trial.max_steps, or entries would differ in their number of steps")
    if not applies(key, method):
        raise UserError(f"{entry.where}.{key}: method {method} does not read it")


def _reads(key: str, method: str) -> bool:
    """Whether an entry gets what all share: of what its method does not read, it need not know. A wrong key it does."""
    return key not in FACTS or applies(key, method)


def _check_read(
    path: Path,
    trial: Mapping[str, Any],
    given: Mapping[str, Mapping[str, str]],
    spaces: Mapping[str, Space],
    entries: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuse what is for all and that none reads."""
    methods = {entry: str(space.fixed["method"]) for entry, space in spaces.items()}
    told = given.get("trial", {})
    for key in {**trial, **told}:
        readers = [entry for entry, method in methods.items() if _reads(key, method)]
        where = "--set trial" if key in told else f"{path}: trial"
        if not readers:
            raise UserError(f"{where}.{key}: no method that is compared reads it")
        own = [entry for entry in readers if key in {**entries[entry], **given.get(f"methods.{entry}", {})}]
        if key in told and own == readers:
            raise UserError(f"{where}.{key}: {', '.join(own)} have their own; write methods.{own[0]}.{key}")


def _of_sharpness(config: ComparisonConfig, spaces: Mapping[str, Space]) -> Iterator[str]:
    """A line where the sharpness of one entry could not be compared with another's."""
    firsts = {entry: space.first_config() for entry, space in spaces.items()}
    # Of a whole model it is measured in the weights that the others adapt.
    targets = [one.target_modules for one in firsts.values() if not one.leaves_model]
    adapted = {one if isinstance(one, str) else tuple(sorted(set(one))) for one in targets}
    varied = any("target_modules" in space.varied for space in spaces.values())
    if config.sharpness_radius is not None and (varied or len(adapted) > 1):
        yield "target_modules: entries differ in them, so the sharpness of each is in other weights: do not compare it"


def _of_numbers(spaces: Mapping[str, Space]) -> Iterator[str]:
    """A line where entries compute with other numbers than others."""
    firsts = [space.first_config() for space in spaces.values()]
    for key in ("precision", "quantization"):
        if len({getattr(one, key) for one in firsts}) > 1 or any(key in space.varied for space in spaces.values()):
            yield f"{key}: entries differ in it, so that a difference is one of that too, as are step time and memory"


def _is_drawn(key: str, value: Any) -> bool:
    """Whether trials may differ in it: a distribution, or values under conditions."""
    parts = value if isinstance(value, list) else [value]
    return not takes_mapping(key) and any(isinstance(part, Mapping) for part in parts)


@contextmanager
def _naming(entry: _Entry, own: Container[str]) -> Iterator[None]:
    """Say in what is wrong with a setting in the block that it is the entry's, if it is."""
    try:
        yield
    except UserError as error:
        begins = rf"({re.escape(str(entry.path))}: |--set )trial([.:] ?)(\w+)"
        found = re.match(begins, str(error))
        if found is None or found[3] not in own:
            raise
        line = f"{found[1]}methods.{entry.name}{found[2]}{found[3]}{str(error)[found.end() :]}"
        raise type(error)(line) from None
