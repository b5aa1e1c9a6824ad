"""`bilora-ray ui`: MLflow's pages over every study, or Optuna's."""

from __future__ import annotations

import os
import pwd
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.options import absolute, mlflow_option, storage_option, study_database_option
from bilora_ray.errors import UserError
from bilora_ray.paths import have_home

if TYPE_CHECKING:
    from bilora_ray.search.study.layout import Layout

# What accounts of programs have for a shell, and the numbers that accounts of people have.
NO_SHELLS = ("nologin", "false")
PEOPLE = (501 if sys.platform == "darwin" else 1000, 65534)
EPILOG = """\b
Examples:
  bilora-ray ui --port 5001
  bilora-ray ui --optuna
"""


@click.command(epilog=EPILOG)
@storage_option
@mlflow_option
@click.option("--optuna", is_flag=True, help="Show optuna-dashboard over the study database instead, to look only.")
@study_database_option
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port on 127.0.0.1.")
def command(storage_path: Path, mlflow_uri: str | None, optuna: bool, study_database: str | None, port: int) -> None:
    """Browse all studies and trials in MLflow, on this machine only."""
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.tracking.mlflow_tracker import default_uri, ui_address, ui_command

    have_home()
    if optuna:
        _show_dashboard(Layout(absolute(storage_path), study_database), port)
        return
    folder = Layout(absolute(storage_path)).storage_path
    if mlflow_uri is None and not (folder / "mlflow.db").exists():
        raise UserError(f"--storage-path {storage_path}: no runs here yet; `bilora-ray tune` makes them")
    uri = mlflow_uri or default_uri(folder)
    command_line, environment = ui_command(uri, port)
    _check_free(port)
    _tell_of_others("open it too, and change or remove runs: MLflow asks for no password")
    click.echo(f"In some seconds MLflow is on {ui_address(uri, port)}\nCtrl-C ends it.", err=True)
    os.execve(command_line[0], command_line, {**os.environ, **environment})


def _show_dashboard(layout: Layout, port: int) -> None:
    from bilora_ray.search.study.steering.dashboard import check_dashboard_is_there, serve, storage_to_look_at

    check_dashboard_is_there()
    storage = storage_to_look_at(layout)
    _check_free(port)
    _tell_of_others("look at it too")
    click.echo(f"optuna-dashboard is on http://127.0.0.1:{port}; it can change nothing\nCtrl-C ends it.", err=True)
    serve(storage, port)


def _tell_of_others(what: str) -> None:
    """Say what the other people of this machine can do, where there are any: 127.0.0.1 is theirs too."""
    if _others():
        click.secho(f"Note: the other users of this machine can {what}", fg="yellow", err=True)


def _others() -> set[int]:
    """Who else has an account here to log in to, or a process: on a cluster accounts are seldom listed."""
    shells = {account.pw_uid for account in pwd.getpwall() if not account.pw_shell.endswith(NO_SHELLS)}
    owners = set[int]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            owners.add(process.stat().st_uid)
    return {uid for uid in shells | owners if PEOPLE[0] <= uid < PEOPLE[1]} - {os.getuid()}


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be taken ({error.strerror}); choose another one") from None
