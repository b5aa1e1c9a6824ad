"""`bilora-ray delete`: a study and all that it holds, gone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.options import (
    absolute,
    json_option,
    mlflow_option,
    print_json,
    storage_option,
    study_argument,
    study_database_option,
)
from bilora_ray.search.study.layout import Layout

if TYPE_CHECKING:
    from bilora_ray.search.study.view import StudyView

EPILOG = """\b
Examples:
  bilora-ray delete quickstart
  bilora-ray delete quickstart --yes
"""


@click.command(epilog=EPILOG)
@study_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@storage_option
@study_database_option
@mlflow_option
@json_option
def command(
    study: str, yes: bool, storage_path: Path, study_database: str | None, mlflow_uri: str | None, as_json: bool
) -> None:
    """Remove STUDY: its checkpoints and adapters, its records, and its runs in MLflow. Exported adapters stay.

    Its finalists go with it. The name of a comparison removes all of its studies.
    """
    from bilora_ray.search.study.control.comparisons import parts_of
    from bilora_ray.search.study.control.disk import used
    from bilora_ray.search.study.steering.removal import none_searches, remove
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import steered_study

    layout = Layout(absolute(storage_path), study_database)
    with naming_the_database(layout, then=""), ExitStack() as stack:
        parts = parts_of(layout, study)
        what = "comparison" if parts else "study"
        found = [steered_study(layout, name, even_if_gone=True) for name in parts or [study]]
        studies = [one for view in found for one in stack.enter_context(none_searches(view, layout))]
        if not yes:
            size = in_bytes(sum(used(layout.study(one.study.study_name)) for one in studies))
            trials = sum(len(one.records()) for one in studies)
            question = f"Remove {what} '{study}' of {layout.database}, its {trials} trials and {size}?"
            click.confirm(question, abort=True, err=True)
        artifacts = layout.storage_path / "mlflow-artifacts"
        before, runs, freed = used(artifacts), 0, 0
        for one in studies:
            runs += _remove_runs(mlflow_uri, one)
            freed += remove(one, layout)
        freed += max(0, before - used(artifacts))
    if as_json:
        print_json({"study": study, "freed_bytes": freed, "runs": runs})
    else:
        click.echo(f"{what.capitalize()} '{study}' is removed: {in_bytes(freed)} freed, {runs} runs gone from MLflow.")


def _remove_runs(mlflow_uri: str | None, study: StudyView) -> int:
    layout = study.layout
    if mlflow_uri is None and not (layout.storage_path / "mlflow.db").exists():
        return 0
    from bilora_ray.search.session import STUDY_ID
    from bilora_ray.tracking.mlflow_tracker import default_uri
    from bilora_ray.tracking.removal import remove_runs

    uri = mlflow_uri or default_uri(layout.storage_path)
    artifacts, name = layout.storage_path / "mlflow-artifacts", study.study.study_name
    return remove_runs(uri, study.space.study.project, artifacts, name, {STUDY_ID: study.id})


def in_bytes(size: float) -> str:
    """`2_500_000` as `2.5 MB`."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop()
    return f"{size:.3g} {units[-1]}"
