"""One training without a search, checked and then run: `bilora-ray train` and `bilora_ray.train` are this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_ray.config import TEST_SETTINGS
from bilora_ray.digests import by_setting, changed
from bilora_ray.errors import UserError
from bilora_ray.library.asked import Asked
from bilora_ray.library.spaces import SpaceLike, read_space
from bilora_ray.paths import have_home
from bilora_ray.search.space import Space, setting_of
from bilora_ray.search.space_file import checked_space, parse_override
from bilora_ray.search.study.layout import Layout
from bilora_ray.settings import non_default

if TYPE_CHECKING:
    from bilora_ray.search.preflight import Checked
    from bilora_ray.search.session import Watch
    from bilora_ray.search.study.study import SearchStudy
    from bilora_ray.search.study.view import StudyView

# What a study of one has of a study's settings, whatever its file says.
ALONE = {
    "num_trials": 1,
    "scheduler": "none",
    "points_to_evaluate": [],
    "finalists": 0,
    "finalist_seeds": None,
    "keep_adapters": None,
}


@dataclass(frozen=True)
class Run:
    """One training that is checked, and has not begun.

    Attributes:
        space: without a distribution.
        asked: how it is to be run.
        checked: what its data say.
        notes: lines to show as it starts.
        trial: the number of the trial whose settings it has; None: they are no trial's.
    """

    space: Space
    asked: Asked
    checked: Checked
    notes: Sequence[str]
    trial: int | None


def check_run(
    given: SpaceLike | None,
    overrides: Sequence[str],
    asked: Asked,
    *,
    name: str,
    study: str | None = None,
    number: int | None = None,
) -> Run:
    """Check settings, data and model of one training, before anything starts.

    Args:
        given: the space with the settings; None: those of a trial of `study`, or of `overrides`.
        overrides: `key=value` texts on top.
        asked: how to train.
        name: of the run, a study of one.
        study: the study with the trial.
        number: of the trial; None: the best.

    Raises:
        UserError: one line that says what is wrong, where, and what is allowed.
    """
    asked.check()
    for override in overrides:
        if parse_override(override)[1] in TEST_SETTINGS:
            raise UserError(f"--set {override}: one run has no winner to score; `bilora-ray evaluate` takes its export")
    overrides = (*overrides, *(f"study.{key}={json.dumps(value)}" for key, value in {"name": name, **ALONE}.items()))
    if study is None and number is not None:
        raise UserError("--trial: needs --study")
    if study is not None and given is not None:
        raise UserError("--study: --space says the settings already; give one of the two")
    space = read_space(given, overrides) if study is None else None
    origin = None
    if space is None:
        assert study is not None
        space, origin = _space_of(asked.layout, study, number, overrides)
    space = replace(space, fixed={key: value for key, value in space.fixed.items() if key not in TEST_SETTINGS})
    if space.distributions:
        keys = ", ".join(f"--set {key}=VALUE" for key in dict.fromkeys(map(setting_of, space.distributions)))
        raise UserError(f"{space.path}: one run needs one value for each setting; give {keys}")
    have_home()

    from bilora_ray.quiet import quiet
    from bilora_ray.search.preflight import chat_notes, check_kernels, pinned, preflight

    space = pinned(space, asked.layout if asked.resume else None)
    checked = preflight(space)
    check_kernels(space, apart=False)
    quiet()
    config = space.trial_config({})
    before = {} if origin is None else origin.view.digests_for(config)
    told = changed(config, before, by_setting(checked.digests, config))
    notes = (*told, *checked.notes, *chat_notes(checked))
    return Run(space, asked, checked, notes, None if origin is None else origin.trial)


def run_one(run: Run, watch: Watch) -> SearchStudy:
    """Train what is checked.

    Raises:
        UserError: see `search.alone.train`.
        KeyboardInterrupt: of Ctrl-C, or of `bilora-ray stop`; what is done is kept.
    """
    from bilora_ray.search.alone import train

    asked = run.asked
    watcher = watch(1, run.space.trial_config({}).objective, run.notes, run.checked.labels)
    return train(
        run.space,
        asked.layout,
        resume=asked.resume,
        mlflow_uri=asked.mlflow_uri,
        digests=run.checked.digests,
        watcher=watcher,
    )


@dataclass(frozen=True)
class _Origin:
    """The trial whose settings a run has."""

    view: StudyView
    trial: int


def _space_of(layout: Layout, study: str, number: int | None, overrides: Sequence[str]) -> tuple[Space, _Origin]:
    """The settings of a trial of `study`, the best as a rule, with `overrides` on top."""
    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study, refuse_trained_anew

    with naming_the_database(layout, then=""):
        found = load_study(layout, study)
        if number is None:
            refuse_trained_anew(found, takes_trial=True)
        finals = finals_of(found) if number is None else None
        if finals is not None and finals.verdict is not None:
            number = finals.verdict.winner.trial
        record = found.chosen(number)
    trial = non_default(record.settings)
    if ("trial", "seed") in {parse_override(text)[:2] for text in overrides}:
        # Other weights and another order are compared on the same rows.
        trial["split_seed"] = found.space.trial_config(record.sampled).resolved_split_seed
    sections = {
        "study": {"project": found.space.study.project},
        "trial": trial,
        "resources": found.space.resources.model_dump(),
    }
    space = checked_space(sections, Path(f"study '{study}', trial {record.number}"), overrides)
    return space, _Origin(found, record.number)
