"""`bilora-ray train`: one adapter, without a search and without Ray."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from bilora_ray.cli.leaderboard import as_json as trial_as_json
from bilora_ray.cli.options import (
    SPACE,
    absolute,
    complete_study,
    insecure_option,
    json_option,
    leaving_to_go_on,
    mlflow_option,
    print_json,
    print_next,
    set_option,
    storage_option,
    study_database_option,
    trial_option,
    where_adapter_is,
)
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.waiting import waiting
from bilora_ray.errors import UserError
from bilora_ray.library.asked import Asked
from bilora_ray.library.training import check_run, run_one
from bilora_ray.search.study.layout import Layout

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
    layout = Layout(absolute(storage_path), study_database)
    asked = Asked(layout=layout, resume=resume, mlflow_uri=mlflow_uri, insecure=insecure)
    with waiting("reading and checking the data and the model"):
        one = check_run(space_path, overrides, asked, name=name, study=study, number=number)
    if one.trial is not None:
        click.echo(f"Settings of trial {one.trial} of study '{study}'", err=True)
    # Which trial is the best one may have changed by the time of a resume.
    with leaving_to_go_on(*([] if study is None or number is not None else [f"--trial={one.trial}"])):
        trained = run_one(one, partial(SearchProgress, starting="opening MLflow"))
    objective = trained.objective
    record = trained.record(0)
    if as_json:
        print_json(trial_as_json(record, objective.metric))
    if problem := record.error or record.broken:
        raise UserError(f"run '{name}' failed: {problem}")
    if not as_json:
        click.secho(f"{objective.metric} {record.value:.6g}", fg="green", bold=True)
        print_next(name, storage_path, study_database, where_adapter_is(trained, record), mlflow_uri)
