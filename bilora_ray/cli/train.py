"""`bilora-ray train`: one adapter, without a search and without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.leaderboard import as_json as trial_as_json
from bilora_ray.cli.options import (
    SPACE,
    absolute,
    complete_study,
    insecure_option,
    json_option,
    mlflow_option,
    print_json,
    print_next,
    say_how_to_go_on,
    set_option,
    storage_option,
    study_database_option,
    trial_option,
    where_adapter_is,
)
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.config import TEST_SETTINGS
from bilora_ray.digests import by_setting, changed
from bilora_ray.errors import UserError
from bilora_ray.paths import have_home
from bilora_ray.search.cluster.protection import check_mlflow
from bilora_ray.search.space import Space, setting_of
from bilora_ray.search.space_file import checked_space, load_space, parse_override
from bilora_ray.search.study.layout import Layout
from bilora_ray.words import non_default

if TYPE_CHECKING:
    from bilora_ray.search.study.view import StudyView

EPILOG = """\b
Examples:
  bilora-ray train --set model_name_or_path=meta-llama/Llama-3.1-8B --set task=causal-lm --set train_data=mine.jsonl
  bilora-ray train --space quickstart --name once --set rank=8 --set learning_rate=2e-3 \\
      --set rho=0.05 --set auxiliary_rank=8
  bilora-ray train --study quickstart --name longer --set num_train_epochs=24
"""


@click.command(epilog=EPILOG)
@click.option("--space", "space_path", type=SPACE, metavar="FILE|NAME", help="Take settings from here, as tune does.")
@click.option(
    "--study",
    metavar="STUDY",
    shell_complete=complete_study,
    help="Take settings from a trial of this study, to train it anew.",
)
@trial_option
@set_option
@click.option("--name", default="train", show_default=True, metavar="NAME", help="Name of the run, a study of one.")
@click.option("--resume", is_flag=True, help="Go on with the run after an interruption.")
@storage_option
@study_database_option
@mlflow_option
@insecure_option
@json_option
def command(
    space_path: Path | None,
    study: str | None,
    number: int | None,
    overrides: tuple[str, ...],
    name: str,
    resume: bool,
    storage_path: Path,
    study_database: str | None,
    mlflow_uri: str | None,
    insecure: bool,
    as_json: bool,
) -> None:
    """Train one adapter with given settings: of a space file, of a trial of a study, of --set.

    The run is kept and tracked like a study with one trial, so show and export take its NAME.
    """
    if not insecure:
        check_mlflow(mlflow_uri)
    layout = Layout(absolute(storage_path), study_database)
    single = {"name": json.dumps(name), "num_trials": 1, "scheduler": "none", "points_to_evaluate": "[]"}
    single |= {"finalists": 0, "finalist_seeds": "null", "keep_adapters": "null"}
    found_out: tuple[str, ...] = ()
    origin: StudyView | None = None
    for override in overrides:
        if parse_override(override)[1] in TEST_SETTINGS:
            raise UserError(f"--set {override}: one run has no winner to score; `bilora-ray evaluate` takes its export")
    overrides += tuple(f"study.{key}={value}" for key, value in single.items())
    if study is not None:
        if space_path is not None:
            raise UserError("--study: --space says the settings already; give one of the two")
        space, best, origin = _space_of(layout, study, number, overrides)
        # Which trial is the best one may have changed by the time of a resume.
        found_out = () if number is not None else (f"--trial={best}",)
    elif number is not None:
        raise UserError("--trial: needs --study")
    else:
        space = load_space(space_path, overrides)
    space = replace(space, fixed={key: value for key, value in space.fixed.items() if key not in TEST_SETTINGS})
    if space.distributions:
        keys = ", ".join(f"--set {key}=VALUE" for key in dict.fromkeys(map(setting_of, space.distributions)))
        raise UserError(f"{space.path}: one run needs one value for each setting; give {keys}")
    have_home()

    from bilora_ray.quiet import quiet
    from bilora_ray.search.alone import train
    from bilora_ray.search.preflight import chat_notes, check_kernels, pinned, preflight

    space = pinned(space, layout if resume else None)
    checked = preflight(space)
    check_kernels(space, apart=False)
    quiet()
    config = space.trial_config({})
    objective, before = config.objective, {} if origin is None else origin.digests_for(config)
    told = changed(config, before, by_setting(checked.digests, config))
    watcher = SearchProgress(1, objective, (*told, *checked.notes, *chat_notes(checked)), checked.labels)
    try:
        trained = train(space, layout, resume=resume, mlflow_uri=mlflow_uri, digests=checked.digests, watcher=watcher)
    except KeyboardInterrupt:
        say_how_to_go_on(*found_out)
    record = trained.record(0)
    if as_json:
        print_json(trial_as_json(record, objective.metric))
    if problem := record.error or record.broken:
        raise UserError(f"run '{name}' failed: {problem}")
    if not as_json:
        click.secho(f"{objective.metric} {record.value:.6g}", fg="green", bold=True)
        print_next(name, storage_path, study_database, where_adapter_is(trained, record), mlflow_uri)


def _space_of(layout: Layout, study: str, number: int | None, overrides: Sequence[str]) -> tuple[Space, int, StudyView]:
    """The settings of a trial of `study`, the best as a rule, with `overrides` on top; its number; the study."""
    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study, refuse_finalists

    with naming_the_database(layout, then=""):
        found = load_study(layout, study)
        if number is None:
            refuse_finalists(found)
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
    click.echo(f"Settings of trial {record.number} of study '{study}'", err=True)
    space = checked_space(sections, Path(f"study '{study}', trial {record.number}"), overrides)
    return space, record.number, found
