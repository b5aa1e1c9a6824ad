"""Where MLflow keeps runs: which URIs will do, and how to get a client that neither chats nor hangs."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bilora_ray.addresses import is_local, masked
from bilora_ray.errors import UserError, nearest
from bilora_ray.tracking.guard import reason
from bilora_ray.tracking.pages import VIEW

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVERS = ("http", "https")
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SCHEMES = ("sqlite", *SERVERS, *DATABASE_PORTS, "databricks")
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
# One retry, for a server that closes an idle connection just as it is used; MLflow's own seven take four minutes.
ENVIRONMENT = {
    TIMEOUT: "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# What MLflow shows a server: one of these is enough.
CREDENTIALS = (
    ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    ("MLFLOW_TRACKING_TOKEN",),
    ("MLFLOW_TRACKING_AUTH",),
    ("MLFLOW_TRACKING_AWS_SIGV4",),
    ("MLFLOW_TRACKING_CLIENT_CERT_PATH",),
)
CREDENTIALS_FILE = "~/.mlflow/credentials"
# Whoever speaks for a failure is the guard; these would each print it too, some with a traceback.
LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")
# Where a store knows a path below the folder of its artifacts.
PLACES = (("runs", "artifact_uri"), ("logged_models", "artifact_location"), ("model_versions", "storage_location"))
PROBE_TIMEOUT_S = 5.0
UPLOAD_TIMEOUT_S = 120


def make_store(uri: str, artifact_root: Path) -> None:
    """Make the file of a SQLite store and the folder of its artifacts, if missing. A server has its own.

    `connect`, which is called again amid a search, makes neither: if they are missing then, their disk is away.

    Raises:
        UserError: `uri` is none that MLflow can use, or a file that cannot be made.
    """
    option = f"--mlflow-uri {masked(uri)}"
    database = _check(uri, option)
    if database is None:
        return
    try:
        for folder in (artifact_root, database.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for file in (database, _lock_file(database)):
            file.touch()
    except OSError as error:
        raise UserError(f"{option}: cannot be written ({reason(error)})") from None


def connect(uri: str, project: str, artifact_root: Path) -> tuple[MlflowClient, str]:
    """A client of the store at `uri`, and the id of the experiment `project` in it, which is made if missing.

    Args:
        uri: MLflow tracking URI.
        project: name of the experiment.
        artifact_root: folder of the artifacts, where the store is a SQLite file; a server has its own place.

    Raises:
        UserError: `uri` is none that MLflow can use, or a file that is missing or cannot be written.
        Exception: whatever MLflow, the network or a database driver raises.
    """
    option = f"--mlflow-uri {masked(uri)}"
    database = _check(uri, option)
    if database is None:
        return _client(uri, project, None)
    try:
        with _locked(database):
            _check_writable(database, artifact_root)
            _follow(database, artifact_root.absolute())
            return _client(uri, project, artifact_root)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{option}: cannot be written ({reason(error)})") from None


def check_runs(uri: str) -> None:
    """Refuse the file of a SQLite store that is not there, or is something else: MLflow would make it, or a long noise.

    Raises:
        UserError: that.
    """
    option = f"--mlflow-uri {masked(uri)}"
    database = _check(uri, option)
    if database is None:
        return
    if not database.is_file():
        raise UserError(f"{option}: no such file")
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=PROBE_TIMEOUT_S)) as connection:
            connection.execute("SELECT experiment_id FROM experiments LIMIT 1")
    except sqlite3.Error as error:
        raise UserError(f"{option}: cannot be read as MLflow's ({reason(error)})") from None


def newest_view(uri: str) -> tuple[str, str] | None:
    """The newest study that the pages of its experiment offer a view of: the experiment and the study's run.

    Args:
        uri: MLflow tracking URI of a database. It is looked into where it is a SQLite file.
    """
    database = _check(uri, f"--mlflow-uri {masked(uri)}")
    if database is None:
        return None
    query = (
        "SELECT runs.experiment_id, run_uuid FROM runs JOIN experiment_tags ON key = ? || run_uuid "
        "AND experiment_tags.experiment_id = runs.experiment_id WHERE lifecycle_stage = 'active' "
        "ORDER BY start_time DESC LIMIT 1"
    )
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=PROBE_TIMEOUT_S)) as connection:
        found = connection.execute(query, (VIEW,)).fetchone()
    return None if found is None else (str(found[0]), str(found[1]))


def seen(uri: str) -> str:
    """What is behind `uri`, in words; nothing is made or written.

    Raises:
        UserError: nothing that MLflow can use.
    """
    option = f"--mlflow-uri {masked(uri)}"
    database = _check(uri, option)
    if database is not None:
        return _seen_file(uri, database, option)
    try:
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool

        if urlsplit(uri).scheme.partition("+")[0] in DATABASE_PORTS:  # where MLflow would make its tables
            create_engine(uri, poolclass=NullPool).connect().close()
        else:
            _quiet_client(uri).search_experiments(max_results=1)
    except Exception as error:  # of HTTP, of MLflow, of a database's driver
        raise UserError(f"{option}: MLflow does not answer ({reason(error)})") from None
    return f"{masked(uri)} answers"


def _seen_file(uri: str, database: Path, option: str) -> str:
    place = next(folder for folder in (database.parent, *database.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{option}: cannot be written ({reason(error)})") from None
    if not database.exists():
        return f"{database}, made by the first search"
    check_runs(uri)
    return str(database)


def unprotected(uri: str) -> bool:
    """Whether `uri` is a server on another machine and nothing here holds a password or token for it."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # no address, which is said when it is used
        return False
    known = parts.password or any(all(map(os.environ.get, names)) for names in CREDENTIALS)
    known = known or os.path.isfile(os.path.expanduser(CREDENTIALS_FILE))  # as it is, where no home is known
    return parts.scheme in SERVERS and bool(parts.hostname) and not is_local(parts.hostname or "") and not known


@contextmanager
def patience() -> Iterator[None]:
    """Let one request take minutes in the block: a server answers an upload only when it has passed it on."""
    before = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(max(int(before), UPLOAD_TIMEOUT_S))
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def _check(uri: str, option: str) -> Path | None:
    """The file of a SQLite URI, None for another usable one. UserError for what MLflow cannot use."""
    scheme, _, rest = uri.partition("://")
    scheme = scheme.partition("+")[0]
    if scheme == "file" or ("://" not in uri and uri != "databricks"):
        file = Path(rest or uri).absolute() / "mlflow.db"
        raise UserError(
            f"{option}: MLflow keeps no runs in plain folders any more; name a file, as in sqlite:///{file}"
        )
    if scheme not in SCHEMES:
        raise UserError(f"{option}: unknown scheme '{scheme}'; {nearest(scheme, SCHEMES)}")
    if scheme == "sqlite":
        name = rest.partition("?")[0][1:]
        if name in ("", ":memory:"):
            raise UserError(f"{option}: names no file; write sqlite:////absolute/path/mlflow.db")
        return Path(name).absolute()
    if scheme in DATABASE_PORTS:
        _check_port(uri, DATABASE_PORTS[scheme], option)
    return None


def _check_port(uri: str, default_port: int, option: str) -> None:
    """UserError if nothing listens: MLflow itself would try a database for 100 s without a word."""
    parts = urlsplit(uri)
    if parts.hostname is None:
        return
    try:
        socket.create_connection((parts.hostname, parts.port or default_port), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"{option}: MLflow does not answer ({reason(error)})") from None


def _check_writable(database: Path, artifact_root: Path) -> None:
    """OSError or sqlite3.Error unless both can be written; MLflow itself would try for 100 s."""
    tempfile.TemporaryFile(dir=artifact_root).close()
    connection = sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=PROBE_TIMEOUT_S)
    try:
        connection.execute("BEGIN IMMEDIATE")
    finally:
        connection.close()


def _follow(database: Path, artifact_root: Path) -> None:
    """Have a store keep its artifacts beside it where both were moved: MLflow makes the folder that it knows anew."""
    if database.parent != artifact_root.parent:
        return
    new = str(artifact_root)
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=PROBE_TIMEOUT_S)) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone() is None:
            return
        for (old,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
            if old == new or not old.startswith("/") or Path(old).name != artifact_root.name:
                continue  # it is here, or where a person has put it
            with connection:
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (new, old)
                )
                for table, column in PLACES:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, length(?) + 1) "
                        f"WHERE substr({column}, 1, length(?)) = ?",
                        (new, old, f"{old}/", f"{old}/"),
                    )


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """One process at a time: two that make the tables of one database break each other."""
    with _lock_file(database).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(database: Path) -> Path:
    return database.with_name(f"{database.name}.lock")


def _quiet_client(uri: str) -> MlflowClient:
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(uri)


def _client(uri: str, project: str, artifact_root: Path | None) -> tuple[MlflowClient, str]:
    client = _quiet_client(uri)  # MLflow reads the environment as it is imported
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        location = None if artifact_root is None else str(artifact_root.absolute())
        try:
            return client, client.create_experiment(project, artifact_location=location)
        except MlflowException:
            experiment = client.get_experiment_by_name(project)
            if experiment is None:  # else another search has made it in between
                raise
    if experiment.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise UserError(f"study.project: '{project}' was deleted in MLflow; choose another or restore it: {restore}")
    return client, experiment.experiment_id
