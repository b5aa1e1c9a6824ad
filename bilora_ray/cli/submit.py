"""`bilora-ray submit`: a search that runs on a cluster, while this machine may go home."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from bilora_ray.addresses import masked
from bilora_ray.cli import tune
from bilora_ray.cli.options import command_that_resumes, json_option, print_json, search_options
from bilora_ray.errors import UserError
from bilora_ray.interruption import leaving
from bilora_ray.library.spaces import space_to_search
from bilora_ray.paths import LocalSource, SourcesElsewhere, have_home
from bilora_ray.search.cluster.protection import check_ray
from bilora_ray.search.space_file import parse_override
from bilora_ray.search.study.layout import Layout

if TYPE_CHECKING:
    from bilora_ray.search.cluster.submission import JobSubmissionClient, Outcome

EPILOG = """\b
Examples:
  bilora-ray submit --address http://127.0.0.1:8265 --space my_space.yaml --storage-path /shared/runs --follow
  bilora-ray submit --address http://127.0.0.1:8265 --space my_space.yaml --storage-path /shared/runs --dry-run --follow
"""
# These options of `tune` are not passed on as they are typed.
CHANGED = {"space_path", "overrides", "storage_path", "as_json"}


@click.command(epilog=EPILOG)
@click.option(
    "--address",
    required=True,
    envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    metavar="URL",
    help="The cluster's Ray dashboard: http://HOST:8265.",
)
@click.option(
    "--working-dir",
    default=".",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="What the job is sent: the space file, and the local files that it names.  [default: the current folder]",
)
@click.option("--follow", is_flag=True, help="Print the job's log until the job ends, and exit with its code.")
@search_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    address: str,
    working_dir: Path,
    follow: bool,
    space_path: Path,
    overrides: tuple[str, ...],
    num_trials: int | None,
    max_concurrent: int | None,
    storage_path: Path,
    study_database: str | None,
    mlflow_uri: str | None,
    insecure: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Run a search as a job of a Ray cluster: `bilora-ray tune`, with the options that are given here.

    The job runs without this machine. Relative paths are files of the working folder, which is uploaded; absolute ones
    are the cluster's. Nothing of the environment here is sent. --resume goes on with a study after its job has ended.
    """
    address = _checked_address(address)
    if not insecure:
        check_ray(address, "--address")
    _check_for_the_cluster(storage_path, mlflow_uri, study_database)
    sources = SourcesElsewhere()
    space = space_to_search(space_path, overrides, num_trials, max_concurrent, sources)
    have_home()

    from bilora_ray.search.cluster.submission import connect, submit
    from bilora_ray.search.cluster.upload import check_upload, read_upload

    upload = read_upload(working_dir)
    space_file = check_upload(upload, space, sources.local)
    settings = [f"--set={_from_folder(text, sources.local, upload.folder)}" for text in overrides]
    places = [f"--storage-path={storage_path}", "--ray-address=auto"]
    client = connect(address)
    words = ["bilora-ray", "tune", f"--space={space_file}", *settings, *_passed_on(ctx), *places]
    job_id = submit(client, words, upload.folder)
    if as_json and not follow:
        print_json({"job_id": job_id, "address": address})
    else:
        _print_job(job_id, address, err=follow)
    if follow:
        _follow(client, job_id, address, as_json)


def _follow(client: JobSubmissionClient, job_id: str, address: str, as_json: bool) -> NoReturn:
    """Print the job's log to its end, and exit with its code. Ctrl-C ends the printing, not the job."""
    from bilora_ray.search.cluster.submission import Follower

    ways = f"Follow: {_ray_job('logs --follow', job_id, address)}  Stop: {_ray_job('stop', job_id, address)}"
    with leaving(f"Detached; job {job_id} goes on. {ways}"):
        outcome = Follower(client, job_id, partial(click.echo, nl=False, err=as_json)).follow()
    if as_json:
        ending = {"status": outcome and outcome.status, "exit_code": outcome and outcome.exit_code}
        print_json({"job_id": job_id, "address": address, **ending})
    _exit(outcome, job_id, address)


def _checked_address(address: str) -> str:
    try:
        parts = urlsplit(address)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise UserError(f"--address {masked(address)}: must be that of a Ray dashboard, as in http://HOST:8265")
    if parts.username is not None:
        raise UserError(
            "--address: holds a user's name; Ray knows tokens only: RAY_AUTH_MODE=token, RAY_AUTH_TOKEN=..."
        )
    return address.rstrip("/")


def _check_for_the_cluster(storage_path: Path, mlflow_uri: str | None, study_database: str | None) -> None:
    if not storage_path.is_absolute():
        raise UserError(
            f"--storage-path {storage_path}: must be absolute, of a folder that all nodes of the cluster share"
        )
    Layout(storage_path, study_database)  # refuses what no search can use
    for option, uri, ways in (
        ("--mlflow-uri", mlflow_uri, "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_PASSWORD,"),
        ("--study-database", study_database, "BILORA_RAY_STUDY_DATABASE, or PGPASSWORD,"),
    ):
        if uri and masked(uri) != uri:
            raise UserError(
                f"{option}: everybody on the cluster could read its password in the job's command line; "
                f"set {ways} on the cluster"
            )


def _from_folder(override: str, sources: Sequence[LocalSource], folder: Path) -> str:
    """A `--set` text as the job must read it, whose current folder is `folder`."""
    section, key, value = parse_override(override)
    named = {source.name: source.path for source in sources if source.where == f"--set trial.{key}"}
    if section != "trial" or not named:
        return override

    def moved(name: Any) -> Any:
        return str(named[name].relative_to(folder)) if isinstance(name, str) and name in named else name

    if isinstance(value, dict) and isinstance(value.get("choice"), list):
        return f"{key}={json.dumps({**value, 'choice': [moved(name) for name in value['choice']]})}"
    return f"{key}={json.dumps(moved(value))}"


def _passed_on(ctx: click.Context) -> Iterator[str]:
    """The options of `tune` that were typed: what only the environment says is meant for this machine."""
    passed_on = {parameter.name for parameter in tune.command.params} - CHANGED
    for parameter in ctx.command.params:
        name = parameter.name
        if name in passed_on and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = ctx.params[name]
            yield parameter.opts[0] if value is True else f"{parameter.opts[0]}={value}"


def _ray_job(verb: str, job_id: str, address: str) -> str:
    return shlex.join(["ray", "job", *verb.split(), "--address", address, job_id])


def _print_job(job_id: str, address: str, err: bool) -> None:
    click.echo(f"Job     {job_id}", err=err)
    for what, verb in (("Follow", "logs --follow"), ("Status", "status"), ("Stop", "stop")):
        click.echo(f"{what:<7} {_ray_job(verb, job_id, address)}", err=err)


def _exit(outcome: Outcome | None, job_id: str, address: str) -> NoReturn:
    """Exit with the job's code, and say how to go on where that makes sense."""
    if outcome is None:
        again = _ray_job("logs --follow", job_id, address)
        click.echo(f"Error: --address {address}: answers no more. Job {job_id} may go on: {again}", err=True)
        sys.exit(1)
    if outcome.problem:
        click.echo(f"Error: job {job_id} did not start: {outcome.problem}", err=True)
    elif outcome.exit_code not in (0, 2):
        how = "was stopped" if outcome.status == "STOPPED" else f"ended with exit code {outcome.exit_code}"
        click.echo(f"Job {job_id} {how}; what is done is kept. Go on: {command_that_resumes()}", err=True)
    sys.exit(outcome.exit_code)
