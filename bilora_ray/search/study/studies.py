"""The studies of a storage path: to begin one, to go on with one, to look at one, to remove one."""

from __future__ import annotations

import json
import shlex
import shutil
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from pydantic_core import to_jsonable_python

from bilora_ray.checking import Settings, before, build, completed
from bilora_ray.config import TrialConfig
from bilora_ray.digests import BASE, CHAT_TEMPLATE, of_data, of_marked
from bilora_ray.errors import UserError, nearest
from bilora_ray.expressions import parsed
from bilora_ray.records import Status
from bilora_ray.search.space import (
    BUDGETS,
    FINALISTS_OF,
    READ_BY,
    Choice,
    Distribution,
    Given,
    Range,
    ResourceConfig,
    Space,
    StudyConfig,
    is_expression,
    setting_of,
)
from bilora_ray.search.space.order import without_effect
from bilora_ray.search.study.control.budget import end_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.looks import Looks
from bilora_ray.search.study.schedulers.base import factor_unsaid
from bilora_ray.search.study.storage import making, naming_the_database, open_storage, read_storage, study_names
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import DIGESTS, ID, StudyView, compared_in, objective_of, search_of, status_of
from bilora_ray.search.study.warm_start import SPACE, WARM_START, first_points, taken
from bilora_ray.settings import coerce, takes_mapping

MAXIMIZE, MINIMIZE = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
LISTED = "`bilora-ray show` lists them"
# What may differ between the first start of a study and its resume.
FREE_TO_CHANGE = frozenset(
    {"num_trials", "max_concurrent", "finalists", "finalist_seeds", "keep_adapters", "max_disk_gb", *BUDGETS}
)
# What a file may leave unsaid, and has been said of its study at the start.
FACTORED = "study.reduction_factor"
# What a distribution, or a value under a condition, is told from other mappings by.
PARTS = {"choice", "low", "value"}
ONLY = "of a study only num_trials, max_concurrent, its finalists, what it keeps and what it may use may change"


@dataclass(frozen=True)
class StudySummary:
    """A study among others.

    Attributes:
        study: its name.
        num_trials: how many trials it is to finish.
        ended: how many have ended.
        metric: what they are judged by.
        best: the best value of a complete trial; None before there is one, and of finalists and the runs of a
            comparison, which are judged together.
        is_gone: whether its folder is not where it was: other verbs say where that is.
    """

    study: str
    num_trials: int
    ended: int
    metric: str
    best: float | None
    is_gone: bool = False


def check_study(space: Space, layout: Layout, resume: bool, digests: Mapping[str, str]) -> None:
    """Refuse to begin a study that exists or to resume one that does not, before anything is written.

    Args:
        space: the study's.
        layout: where studies are.
        resume: whether it shall go on.
        digests: source -> digest of its content, now.

    Raises:
        UserError: that, or the study began with another space, with other data, in another storage path, or for more
            trials.
    """
    name, names = space.study.name, study_names(layout)
    begun = name in names and has_begun(name, layout)
    if resume and not begun:
        _check_known(layout, name, names)
        hint = f"; {nearest(name, names, LISTED)}" if names and name not in names else ""
        raise UserError(f"study '{name}': nothing to resume in {layout.database}{hint}")
    if resume:
        _check_begun(_read(layout, name), space, layout, digests)
    elif begun:
        _check_place(_read(layout, name), layout)
        raise UserError(
            f"study '{name}' exists in {layout.database}: go on with --resume, or give this one another name"
        )
    else:
        _check_known(layout, name, [])
        _taken(space, layout)


def open_study(
    space: Space, layout: Layout, digests: Mapping[str, str], kept: Mapping[str, Any] | None = None
) -> SearchStudy:
    """The study of `space`, created if `check_study` found none. One that was made but never begun is made anew.

    Args:
        space: the study's.
        layout: where studies are.
        digests: source -> digest of its content.
        kept: attributes of the study that are kept with it from its beginning.

    Raises:
        UserError: as `check_study`, if another process has begun it since.
    """
    layout.make(space.study.name)
    with layout.choosing(space.study.name), making(layout, f"study {space.study.name}"):
        opened = SearchStudy(_made(space, layout, digests, kept or {}), space, layout)
    opened.adopt()
    return opened


def _made(space: Space, layout: Layout, digests: Mapping[str, str], kept: Mapping[str, Any]) -> optuna.Study:
    name, storage = space.study.name, Looks(open_storage(layout))
    begun = name in study_names(layout) and has_begun(name, layout)
    if begun:
        study = optuna.load_study(study_name=name, storage=storage)
        _check_begun(study, space, layout, digests)
    elif name in study_names(layout):
        optuna.delete_study(study_name=name, storage=storage)
    warm = [] if begun else _taken(space, layout)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    directions = [MAXIMIZE if one.greater_is_better else MINIMIZE for one in space.objectives]
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    if not begun:
        study.set_user_attr(ID, uuid.uuid4().hex)
        study.set_user_attr(DIGESTS, dict(digests))
        for key, value in kept.items():
            study.set_user_attr(key, value)
        (layout.study(name) / ID).write_text(study.user_attrs[ID])
        if warm:
            study.set_user_attr(WARM_START, warm)
        # Of one that has begun they are there, but for those that a person has dropped.
        points = list(map(space.parameters, space.points_to_evaluate))
        # Who comes first to a rung goes on from it, whatever it is worth: so one that is proposed is the first.
        points += [{}] if warm and not points else []
        for point in (*points, *first_points(warm)):
            study.enqueue_trial(point, skip_if_exists=True)
    described = _described(space)
    if begun:
        described["study"]["reduction_factor"] = study.user_attrs[SPACE]["study"].get("reduction_factor")
    study.set_user_attr(SPACE, described)
    return study


def steered_study(layout: Layout, name: str, even_if_gone: bool = False) -> StudyView:
    """As `load_study`, to write to beside a search that runs it."""
    found = load_study(layout, name, even_if_gone)
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    return StudyView(study, found.space, layout)


def _taken(space: Space, layout: Layout) -> list[dict[str, Any]]:
    """What the study of `space` takes from those that it is to start from. UserError if one cannot be such."""
    sources = []
    for name in dict.fromkeys(space.study.warm_start):
        if name == space.study.name:
            raise UserError(f"--warm-start {name}: is the study itself; name earlier ones")
        names = [known for known in study_names(layout) if known != space.study.name]
        if name not in names:
            hint = f"; {nearest(name, names, LISTED)}" if names else ""
            raise UserError(f"--warm-start {name}: not in {layout.database}{hint}")
        source = _read(layout, name)
        if SPACE not in source.user_attrs:
            raise UserError(f"--warm-start {name}: was never begun")
        sources.append(source)
    return taken(sources, space)


def load_study(layout: Layout, name: str, even_if_gone: bool = False) -> StudyView:
    """The study `name`, to read.

    Args:
        layout: where studies are.
        name: its own.
        even_if_gone: take what the database knows of a study whose folder was removed, to remove that too.

    Raises:
        UserError: there is none that has begun, or it is not all there any more.
    """
    names = study_names(layout)
    if name not in names:
        _check_known(layout, name, names)
        raise UserError(
            f"study '{name}': not in {layout.database}{f'; {nearest(name, names, LISTED)}' if names else ''}"
        )
    study = _read(layout, name)
    if SPACE not in study.user_attrs:
        raise UserError(f"study '{name}': was never begun")
    if not even_if_gone:
        _check_place(study, layout)
    return StudyView(study, _space(study), layout)


def finalists_of(layout: Layout, search: str) -> str | None:
    """The study that trains the finalists of a `search`, which is there; None before it has begun."""
    name = FINALISTS_OF.format(search)
    study = _read(layout, name) if name in study_names(layout) else None
    return name if study is not None and search_of(study) is not None and SPACE in study.user_attrs else None


def refuse_trained_anew(found: StudyView, takes_trial: bool = False) -> None:
    """UserError if a study trains finalists, or runs of a comparison: it has no best trial, and searches nothing.

    Args:
        found: the study.
        takes_trial: whether one of its trials would be taken by its number.
    """
    name = found.study.study_name
    if (comparison := compared_in(found.study)) is not None:
        line = f"study '{name}': holds the runs of comparison '{comparison}': none is its best, and nothing is searched"
        raise UserError(f"{line}; --trial takes one of them" if takes_trial else line)
    if (search := search_of(found.study)) is not None:
        raise UserError(f"study '{name}': trains the finalists of '{search}', where they are judged; name that one")


def summarise(layout: Layout) -> list[StudySummary]:
    """The studies that have begun, oldest first. Reads the database alone: the trials may be kept elsewhere."""
    if (storage := read_storage(layout)) is None:
        return []
    loaded = (optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage))
    return [_summary(study, layout) for study in loaded if SPACE in study.user_attrs]


def _summary(study: optuna.Study, layout: Layout) -> StudySummary:
    described = study.user_attrs[SPACE]
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    values = [trial.values[0] for trial in trials if status_of(trial) is Status.COMPLETE]
    objective = objective_of(study, described["fixed"])
    return StudySummary(
        study=study.study_name,
        num_trials=described["study"]["num_trials"],
        ended=sum(trial.state.is_finished() for trial in trials),
        metric=objective.metric,
        # Of finalists, and of what is compared, it is the luckiest run, and not what is judged.
        best=None if search_of(study) is not None or compared_in(study) is not None else objective.best_value(values),
        is_gone=_is_gone(study, layout),
    )


def settings_before(layout: Layout, name: str) -> dict[str, Any] | None:
    """The settings that all trials of study `name` share since it began; None if there is no such study."""
    with naming_the_database(layout, then=""):
        if name not in study_names(layout):
            return None
        described = _read(layout, name).user_attrs.get(SPACE)
        return None if described is None else _fixed(described)


def num_trials_before(layout: Layout, name: str) -> int:
    """How many trials study `name` was asked for when it last ran; 0 if there is no such study."""
    with naming_the_database(layout, then=""):
        if name not in study_names(layout):
            return 0
        return int(_read(layout, name).user_attrs.get(SPACE, {}).get("study", {}).get("num_trials", 0))


def warm_start_before(layout: Layout, name: str) -> tuple[str, ...]:
    """The studies that study `name` began with; none if there is no such study, or it began with none."""
    with naming_the_database(layout, then=""):
        if name not in study_names(layout):
            return ()
        return tuple(_read(layout, name).user_attrs.get(SPACE, {}).get("study", {}).get("warm_start", ()))


def end_before(space: Space, layout: Layout) -> str | None:
    """Which budget has ended the study of `space` and holds still, in words; None if it can go on, or is not there."""
    name = space.study.name
    with naming_the_database(layout, then=""):
        end = end_of(_read(layout, name).user_attrs, space) if name in study_names(layout) else None
    return None if end is None else end.line


def delete_study(space: Space, layout: Layout) -> None:
    """Remove a study and its folder."""
    optuna.delete_study(study_name=space.study.name, storage=open_storage(layout))
    shutil.rmtree(layout.study(space.study.name), ignore_errors=True)


def _read(layout: Layout, name: str) -> optuna.Study:
    """One of the `study_names`."""
    storage = read_storage(layout)
    assert storage is not None
    return optuna.load_study(study_name=name, storage=storage)


def has_begun(name: str, layout: Layout) -> bool:
    """Whether study `name`, which is there, has begun: one that was made, and of which no trial ran, is made anew."""
    return _has_begun(_read(layout, name), layout)


def begun_studies(layout: Layout, names: Sequence[str]) -> dict[str, StudyView]:
    """Those of the studies `names` that have begun, to read. UserError if one is not all there any more."""
    if (storage := read_storage(layout)) is None:
        return {}
    there = set(optuna.get_all_study_names(storage))
    found = {name: optuna.load_study(study_name=name, storage=storage) for name in names if name in there}
    found = {name: study for name, study in found.items() if _has_begun(study, layout)}
    for study in found.values():
        _check_place(study, layout)
    return {name: StudyView(study, _space(study), layout) for name, study in found.items()}


def _has_begun(study: optuna.Study, layout: Layout) -> bool:
    if SPACE not in study.user_attrs or layout.study_database is not None:
        # Of a database that others use, nobody can tell whether who made the study is about to begin.
        return SPACE in study.user_attrs
    return any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def _check_begun(study: optuna.Study, space: Space, layout: Layout, digests: Mapping[str, str]) -> None:
    """Refuse to go on with a study that began with another space, other data, another base or in another storage path.

    Nor does it get fewer trials than it was asked for: others may run it, and go by their number.
    """
    name, stored = study.study_name, _stored(study)
    _check_place(study, layout)
    began, given = _comparable(stored), _comparable(_described(space))
    if FACTORED in began:
        began[FACTORED] = began[FACTORED] or factor_unsaid(space)
        given[FACTORED] = given.get(FACTORED) or began[FACTORED]
    _check_same(name, "space", began, given)
    begun = study.user_attrs[DIGESTS]
    # Version 0.1.0 kept the first data that it searched, and no base.
    for what, kept, found in (
        ("data", of_data(begun), of_data(digests)),
        ("base model", of_marked(BASE, begun), of_marked(BASE, digests)),
        ("chat template", of_marked(CHAT_TEMPLATE, begun), of_marked(CHAT_TEMPLATE, digests)),
    ):
        _check_same(name, what, kept, {source: found[source] for source in kept if source in found})
    before, now = stored["study"]["num_trials"], space.study.num_trials
    if now < before:
        raise UserError(
            f"study '{name}': num_trials was {before}, is {now}: it may grow only; "
            "show and export take a study as it is"
        )


def _check_known(layout: Layout, name: str, names: Sequence[str]) -> None:
    """Refuse a folder of trials whose study the database has lost: nothing can go on with them, or show them."""
    is_name = Path(name).name == name  # of a path, what is in its folder is none of a study's
    if name not in names and is_name and any(layout.trials(name).glob("[0-9]*")):
        raise UserError(f"{layout.trials(name)}: holds trials that the study database does not know; move it away")


def _check_place(study: optuna.Study, layout: Layout) -> None:
    """Refuse a storage path that is not the study's: its trials would be begun again, beside those that run.

    And one from which its folder was removed: another one in its place would hide that.
    """
    if _is_gone(study, layout):
        name, folder = study.study_name, layout.study(study.study_name)
        raise UserError(
            f"study '{name}': its folder is gone; it was {folder}: put it back, or remove the rest with "
            f"`bilora-ray delete {name}`"
        )
    file = layout.study(study.study_name) / ID
    if layout.study_database is not None and not (file.is_file() and file.read_text() == study.user_attrs[ID]):
        where = f"--storage-path {layout.storage_path}"
        raise UserError(f"{where}: study '{study.study_name}' of {layout.database} keeps its trials in another folder")


def _is_gone(study: optuna.Study, layout: Layout) -> bool:
    """Whether the folder of a study was removed; of a shared database's it may be in another storage path."""
    return layout.study_database is None and not layout.trials(study.study_name).is_dir()


def _described(space: Space) -> dict[str, Any]:
    """A space as the study database keeps it."""
    described = {
        "study": space.study.model_dump(mode="json"),
        "resources": space.resources.model_dump(mode="json"),
        "fixed": space.fixed,
        "distributions": {name: part.described() for name, part in space.distributions.items()},
        "given": {name: part.described() for name, part in space.given.items()},
    }
    return json.loads(json.dumps(described))


def _space(study: optuna.Study) -> Space:
    described, name = _stored(study), f"study {study.study_name}"
    return Space(
        path=Path(name),
        study=build(StudyConfig, described["study"], f"{name}: study"),
        resources=build(ResourceConfig, described["resources"], f"{name}: resources"),
        fixed=_fixed(described),
        distributions={key: _distribution(values) for key, values in described["distributions"].items()},
        points_to_evaluate=(),
        given={key: build(Given, values, name) for key, values in described.get("given", {}).items()},
    )


def _fixed(described: Mapping[str, Any]) -> dict[str, Any]:
    """What all trials share, and what they did before some of the settings were there."""
    return {**before(TrialConfig), **described["fixed"]}


def _stored(study: optuna.Study) -> dict[str, Any]:
    """How the study database describes its space. UserError if that is what only a later version knows."""
    described = study.user_attrs[SPACE]
    kinds: dict[str, type[Settings]] = {"study": StudyConfig, "resources": ResourceConfig, "trial": TrialConfig}
    parts = {setting_of(part) for part in (*described["distributions"], *described.get("given", ()))}
    sections = {**described, "trial": {*described["fixed"], *parts}}
    for section, kind in kinds.items():
        if unknown := set(sections[section]) - kind.model_fields.keys():
            keys = ", ".join(f"{section}.{key}" for key in sorted(unknown))
            raise UserError(f"study '{study.study_name}': a later version wrote it, with {keys}, which this one lacks")
    return described


def _check_same(name: str, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what would give trials of one study that cannot be compared.

    Args:
        name: of the study.
        what: is compared.
        before: key -> value when the study began.
        now: key -> value.
    """
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            was, given = (_in_words(values[key]) if key in values else "absent" for values in (before, now))
            raise UserError(
                f"study '{name}' began with other {what}: {key} was {was}, is {given}; "
                f"{ONLY}{_as_it_was(key, before.get(key))}"
            )


def _comparable(described: Mapping[str, Any]) -> dict[str, Any]:
    """Of a described space what decides its trials: of the resources the number of workers, which is their batches.

    What an earlier version did not know has its default here, as it has for the trials.
    """
    workers = completed(ResourceConfig, described["resources"])["workers"]
    study = completed(StudyConfig, described["study"])
    # What the scheduler does not read was not refused before, and is now.
    unread = {key for key, schedulers in READ_BY.items() if study["scheduler"] not in schedulers}
    compared = {f"study.{key}": value for key, value in study.items() if key not in FREE_TO_CHANGE | unread}
    if "study.points_to_evaluate" in compared:
        points = compared["study.points_to_evaluate"]
        compared["study.points_to_evaluate"] = [{key: _typed(key, point[key]) for key in point} for point in points]
    trial = {key: _typed(key, value) for key, value in completed(TrialConfig, described["fixed"]).items()}
    parts: dict[str, list[Distribution | Given]] = {}
    for name, part in {**described["distributions"], **described.get("given", {})}.items():
        parts.setdefault(setting_of(name), []).append(_part(part))
    # What no trial reads was searched before, and is not now.
    kept = [key for key in parts if key not in without_effect(parts, trial)]
    read = {key: [_in_order(key, part) for part in parts[key]] for key in kept}
    for found in read.values():
        found.sort(key=lambda part: json.dumps(part.get("when"), sort_keys=True))
    return {**compared, "resources.workers": workers, **trial, **read}


def _in_order(key: str, part: Distribution | Given) -> dict[str, Any]:
    """A part of the setting `key` in the same words, whatever order and spaces it was written in."""
    told = part.described()
    if part.when:
        told["when"] = {other: sorted(values, key=repr) for other, values in part.when.items()}
    if isinstance(part, Given) and is_expression(key, part.value):
        told["value"] = str(parsed(part.value))
    return told


def _typed(key: str, value: Any) -> Any:
    """A value as the type of its setting, as JSON holds it: of `3e-4`, which YAML reads as text, the number."""
    if key not in TrialConfig.model_fields or takes_mapping(key):
        return value
    try:
        return to_jsonable_python(coerce(key, value, key))
    except UserError:
        return value


def _in_words(value: Any) -> str:
    return "; ".join(str(_part(part)) for part in value) if _are_parts(value) else repr(value)


def _are_parts(value: Any) -> bool:
    # The points to evaluate and the objectives are lists of mappings, too.
    return isinstance(value, list) and any(isinstance(part, dict) and PARTS & part.keys() for part in value)


def _as_it_was(key: str, value: Any) -> str:
    """How to give a setting the distribution that it had, as it may be of a file that a later version ships."""
    if not _are_parts(value):
        return ""
    told = [{name: given for name, given in part.items() if given is not False or name == "value"} for part in value]
    parts = [", ".join(f"{name}: {json.dumps(given)}" for name, given in part.items()) for part in told]
    text = ", ".join(f"{{{part}}}" for part in parts)
    text = text if len(parts) == 1 else f"[{text}]"
    return f"; go on with --set {shlex.quote(f'{key}={text}')}"


def _part(described: Mapping[str, Any]) -> Distribution | Given:
    return Given(**described) if "value" in described else _distribution(described)


def _distribution(described: Mapping[str, Any]) -> Distribution:
    return Choice(**described) if "choice" in described else Range(**described)
