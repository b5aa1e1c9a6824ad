"""`bilora-ray doctor`: is all there that a search needs?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.options import (
    absolute,
    json_option,
    mlflow_option,
    print_json,
    storage_option,
    study_database_option,
)
from bilora_ray.paths import have_home

if TYPE_CHECKING:
    from bilora_ray.search.readiness.findings import Finding

EPILOG = """\b
Examples:
  bilora-ray doctor
  bilora-ray doctor --ray-address auto --storage-path /shared/runs
"""
COLOURS = {"ok": "green", "note": "yellow", "fault": "red"}


@click.command(epilog=EPILOG)
@storage_option
@study_database_option
@mlflow_option
@click.option("--ray-address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray cluster.  [default: this machine]")
@json_option
def command(
    storage_path: Path, study_database: str | None, mlflow_uri: str | None, ray_address: str | None, as_json: bool
) -> None:
    """Look at all that a search needs, and say how to mend what is wrong.

    Packages, GPUs, memory, disk, the storage path, the study database, MLflow, the Hub, Ray. A `note` is something that
    could be better; with a `fault` a search would not run, and the exit code is 2.
    """
    from bilora_ray.search.study.layout import Layout

    layout = Layout(absolute(storage_path), study_database)
    have_home()

    from bilora_ray.quiet import quiet
    from bilora_ray.search.readiness.doctor import examine
    from bilora_ray.tracking.mlflow_tracker import default_uri

    quiet()
    findings = []
    for finding in examine(layout, ray_address, mlflow_uri or default_uri(layout.storage_path)):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        print_json([{**asdict(finding), "verdict": finding.verdict.value} for finding in findings])
    if any(finding.verdict.value == "fault" for finding in findings):
        sys.exit(2)


def _print(finding: Finding) -> None:
    word = finding.verdict.value
    click.echo(f"{click.style(f'{word:<6}', fg=COLOURS[word])}{finding.about}: {finding.found}")
    if finding.mend is not None:
        click.echo(f"      {finding.mend}")
