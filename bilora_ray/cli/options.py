"""Options that several commands share, so that each has one name, one default and one help text."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from bilora_ray.addresses import masked
from bilora_ray.errors import OutOfMemory, UserError, first_line
from bilora_ray.interruption import leaving
from bilora_ray.paths import absolute as absolute
from bilora_ray.records import TrialRecord
from bilora_ray.search.space.shipped import shipped, space_file
from bilora_ray.search.study.layout import Layout
from bilora_ray.tracking.store import SERVERS
from bilora_ray.words import finite

if TYPE_CHECKING:
    from bilora_ray.search.study.view import StudyView

Command = TypeVar("Command", bound=Callable[..., None])


def complete_study(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The names of the storage path's studies that begin with `incomplete`, for the shell."""
    database = Path(ctx.params.get("storage_path") or "runs") / "studies.db"
    if not database.exists():
        return []
    try:
        # A path may hold signs that mean something in a URI.
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT study_name FROM studies").fetchall()
    except sqlite3.Error:
        return []
    return [name for (name,) in rows if name.startswith(incomplete)]


class SpaceFile(click.ParamType):
    """A space file: a path, or the name of one that ships."""

    name = "space"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The file. UserError if no shipped space has that name."""
        return value if isinstance(value, Path) else space_file(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names that begin with `incomplete`, and the shell's own files."""
        names = [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="file")]


SPACE = SpaceFile()
SPACE_HELP = (
    "The space file (YAML), or the name of one that ships, such as quickstart. A word without a suffix or a "
    "folder is always a name."
)
space_option = click.option("--space", "space_path", required=True, type=SPACE, metavar="FILE|NAME", help=SPACE_HELP)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting of the space file: rho=0.1, study.seed=1, 'rank={choice: [4, 8]}'. Repeatable.",
)
storage_option = click.option(
    "--storage-path",
    default="runs",
    show_default=True,
    envvar="BILORA_RAY_STORAGE_PATH",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where studies, checkpoints and adapters are kept; shared by all nodes of a cluster.",
)
study_database_option = click.option(
    "--study-database",
    envvar="BILORA_RAY_STUDY_DATABASE",
    metavar="URL",
    help="PostgreSQL database of the studies, which several searches may share: postgresql://USER@HOST/DATABASE."
    "  [default: a SQLite file in the storage path]",
)
mlflow_option = click.option(
    "--mlflow-uri",
    envvar="MLFLOW_TRACKING_URI",
    metavar="URI",
    help="MLflow server or database.  [default: a SQLite file in the storage path]",
)
insecure_option = click.option(
    "--insecure",
    is_flag=True,
    help="Use another machine's Ray cluster or MLflow server without a token or password.",
)
# What a search is told, here or on a cluster.
SEARCH_OPTIONS = (
    space_option,
    set_option,
    click.option(
        "--num-trials", type=click.IntRange(min=1), metavar="N", help="Trials to finish.  [default: the space file's]"
    ),
    click.option(
        "--max-concurrent",
        type=click.IntRange(min=1),
        metavar="N",
        help="Trials at one time.  [default: what there is room for]",
    ),
    click.option("--resume", is_flag=True, help="Go on with the study after an interruption, or with more trials."),
    click.option(
        "--extend",
        type=click.IntRange(min=1),
        metavar="N",
        help="Go on with the study, with N trials more than it was asked for.",
    ),
    click.option(
        "--warm-start",
        metavar="STUDY[,STUDY]",
        help="Begin with what was best in earlier studies of the storage path, be it for other data or another model.",
    ),
    storage_option,
    study_database_option,
    mlflow_option,
    insecure_option,
    click.option(
        "--dry-run",
        is_flag=True,
        help="Check data, tokenizer, the model's shape and the study, say what would run, and stop.",
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
study_argument = click.argument("study", shell_complete=complete_study)
optional_study_argument = click.argument("study", required=False, shell_complete=complete_study)
trial_option = click.option("--trial", "number", type=int, metavar="N", help="A trial's number.  [default: the best]")


def print_json(value: Any) -> None:
    """Print `value` for a script to read. JSON has no infinity and no NaN: they become null."""
    click.echo(json.dumps(finite(value), indent=2, default=str, allow_nan=False))


@contextmanager
def telling_of_gpu_memory(what_to_do: str = "") -> Iterator[None]:
    """Say in one line that the block's work is too large for the GPU."""
    try:
        yield
    except OutOfMemory as error:  # in as small passes as can be
        raise UserError(str(error)) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name
            raise
        raise UserError(f"out of GPU memory ({first_line(error)}){what_to_do}") from None


def search_options(command: Command) -> Command:
    """Give `command` the SEARCH_OPTIONS."""
    for option in reversed(SEARCH_OPTIONS):
        command = option(command)
    return command


def command_that_resumes(*more: str) -> str:
    """The command line that was typed, with `more`, with --resume and without passwords.

    Without --extend too, which would ask for more trials once more.
    """
    typed = [masked(argument) for argument in sys.argv[1:] if argument != "--resume"]
    arguments = [
        argument
        for before, argument in zip(["", *typed], typed, strict=False)
        if before != "--extend" and argument.partition("=")[0] != "--extend"
    ]
    return shlex.join([*program(), *arguments, *more, "--resume"])


def program() -> list[str]:
    """The words that call the command line: a path, or Python with a module, where `bilora-ray` alone is not found."""
    called = Path(sys.argv[0])
    if not shutil.which("bilora-ray"):
        if called.name == "bilora-ray":
            return [sys.argv[0]]
        if called.parts[-2:] == ("bilora_ray", "__main__.py"):
            return [sys.executable, "-m", "bilora_ray"]
    return ["bilora-ray"]


def leaving_to_go_on(*more: str) -> AbstractContextManager[None]:
    """See `leaving`: it is said of the block that nothing is lost, with the command that goes on.

    Args:
        more: what that command has beside what was typed.
    """
    return leaving(f"Interrupted; what is done is kept. Go on: {command_that_resumes(*more)}")


def print_next(
    study: str, storage_path: Path, study_database: str | None, adapter: Path, mlflow_uri: str | None = None
) -> None:
    """Print where the best adapter is, or that it is gone, and what can be done next.

    Args:
        study: its name.
        storage_path: as it was given.
        study_database: as it was given.
        adapter: the folder, as `where_adapter_is` tells it.
        mlflow_uri: as it was given.
    """
    command = shlex.join(program())
    there = adapter.is_dir()
    adapter = _from_here(adapter)
    runs = "" if storage_path == Path("runs") else f" --storage-path {shlex.quote(str(storage_path))}"
    where = runs + _again("--study-database", study_database, "BILORA_RAY_STUDY_DATABASE")
    pages: str | None = f"{command} ui{runs}"
    if mlflow_uri is None and not (absolute(storage_path) / "mlflow.db").exists():
        pages = None  # the runs are in an MLflow that this command was not told of
    elif mlflow_uri is not None:
        pages = f"{command} ui{_again('--mlflow-uri', mlflow_uri, 'MLFLOW_TRACKING_URI')}"
        if mlflow_uri.partition("://")[0] in SERVERS:  # it has pages of its own, which `ui` does not show
            pages = masked(mlflow_uri)
    page = Layout(absolute(storage_path), study_database).report(study)
    for what, line in (
        ("Adapter", str(adapter) if there else f"gone; it was in {adapter}"),
        ("Report", str(_from_here(page)) if page.is_file() else None),
        ("More", f"{command} show {study}{where}"),
        ("Take it", f"{command} export {study}{where} --output {study}-adapter" if there else None),
        ("Browse", pages),
    ):
        if line is not None:
            click.echo(f"{what:<8} {line}")


def _from_here(path: Path) -> Path:
    """`path` as it is written from the current folder, if it is in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def where_adapter_is(study: StudyView, record: TrialRecord) -> Path:
    """The folder of a trial's adapter; the trial's own, where nothing there tells of an adapter any more."""
    return record.adapter or study.folder(record.number).path


def _again(option: str, uri: str | None, variable: str) -> str:
    """What gives `option` to another command; nothing if it has no value, or the environment gives it."""
    if uri is None or uri == os.environ.get(variable):
        return ""
    shown = masked(uri)
    # A password is not printed: the command wants it from the environment.
    return f" {option} {shlex.quote(shown)}" if shown == uri else f' {option} "${variable}"'
