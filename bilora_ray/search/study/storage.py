"""The one database of the studies of a storage path."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from bilora_ray.addresses import is_local, masked
from bilora_ray.errors import GO_ON, MachineError, UserError, first_line
from bilora_ray.files import locked
from bilora_ray.search.study.layout import WAIT_S, Layout

CONNECT_TIMEOUT_S = 5
# A person waits for what is only read.
READ_WAIT_S = 5.0
PORT = 5432
# Of the tables that Optuna makes.
LAST_TABLE = "alembic_version"
# What SQLite says of a file that is not its own, is torn, or has other tables.
NOT_OURS = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def open_storage(layout: Layout) -> optuna.storages.RDBStorage:
    """The storage of all studies of a storage path, made if missing.

    Raises:
        UserError: the file is something else, or the server does not answer.
        DatabaseError: the file is held by another process, or its disk fails: see `naming_the_database`.
    """
    return _open(layout) if layout.study_database is None else _open_once(layout)


def _open(layout: Layout) -> optuna.storages.RDBStorage:
    url, engine = _file(layout, "rwc") if layout.study_database is None else _server(layout.study_database)
    layout.storage_path.mkdir(parents=True, exist_ok=True)
    # The same connection again, to which SQLite tells what others have written: see `looks`.
    engine["pool_use_lifo"] = True
    with locked(layout.storage_path / "studies.db.lock", WAIT_S), _readable(layout), making(layout, "tables"):
        return optuna.storages.RDBStorage(url, engine_kwargs=engine)


# Each storage has connections of its own, and a server has not many for all of its searches.
_open_once = lru_cache(_open)


def read_storage(layout: Layout) -> optuna.storages.RDBStorage | None:
    """The storage of all studies of a storage path, to read: nothing is made, and nobody waits for it.

    Returns:
        None where no study was ever begun.

    Raises:
        UserError: the file is something else, or the server does not answer.
    """
    if layout.study_database is None and not layout.database_file.exists():
        return None
    with _readable(layout):
        try:
            return _read(layout)
        except OperationalError as error:
            # A process was killed amid a write, and nobody can read before that is undone.
            if getattr(error.orig, "sqlite_errorname", "") != "SQLITE_READONLY_ROLLBACK":
                raise
    return open_storage(layout)


def _read(layout: Layout) -> optuna.storages.RDBStorage | None:
    url, engine = _file(layout, "ro") if layout.study_database is None else _server(layout.study_database)
    engine["poolclass"] = NullPool  # who only reads keeps no connection
    if not inspect(create_engine(url, **engine)).has_table(LAST_TABLE):
        return None
    return optuna.storages.RDBStorage(url, engine_kwargs=engine, skip_table_creation=True)


@contextmanager
def _readable(layout: Layout) -> Iterator[None]:
    """Say in one line of a database that the block opens why it cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    except (DatabaseError, StorageInternalError, RuntimeError) as error:
        cause = _cause(error)
        if layout.study_database is not None:
            raise UserError(f"--study-database {layout.database}: cannot be used ({first_line(cause)})") from None
        if isinstance(cause, sqlite3.Error) and _code(cause) not in NOT_OURS:
            raise
        raise UserError(f"{layout.database_file}: is not a database of studies that this version can read") from None


def _cause(error: BaseException) -> BaseException:
    """What a database said, of what Optuna and SQLAlchemy make of it."""
    cause = (error.__cause__ or error) if isinstance(error, StorageInternalError) else error
    return getattr(cause, "orig", None) or cause


def _code(cause: BaseException) -> int | None:
    """SQLite's code of what it said."""
    code = getattr(cause, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF  # more bits say more


@contextmanager
def making(layout: Layout, what: str) -> Iterator[None]:
    """For the block, no other process makes `what` in the same PostgreSQL database, whatever its storage path.

    Locks in files keep apart the processes of one storage path only.
    """
    if layout.study_database is None:
        yield
        return
    url, arguments = _server(layout.study_database)
    with create_engine(url, poolclass=NullPool, **arguments).begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), {"what": f"bilora-ray {what}"})
        yield


def study_names(layout: Layout) -> list[str]:
    """The studies of a storage path, or of its database server."""
    storage = read_storage(layout)
    return [] if storage is None else optuna.get_all_study_names(storage)


@contextmanager
def running_study(layout: Layout, name: str) -> Iterator[None]:
    """Run study `name` in the block: as the only process, if its database is a SQLite file.

    Raises:
        UserError: another process runs it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            layout.make(name)
            with layout.choosing(name):
                pass
            if layout.study_database is None:
                stack.enter_context(locked(layout.searching(name), wait_s=0))
        except TimeoutError:
            raise UserError(f"study '{name}' is being searched by another process") from None
        except OSError as error:
            raise UserError(f"--storage-path {layout.storage_path}: cannot be written ({error.strerror})") from None
        yield


@contextmanager
def naming_the_database(layout: Layout, then: str = GO_ON) -> Iterator[None]:
    """Tell an error of the study database or of a disk in the block, such as a full one, in one line.

    Args:
        layout: where studies are.
        then: ends the line: what to do about it.

    Raises:
        MachineError: the study can go on once that is mended.
    """
    try:
        yield
    except (DatabaseError, StorageInternalError) as error:
        cause = _cause(error)
        by_whom = " by another process" if _code(cause) == sqlite3.SQLITE_BUSY else ""
        raise MachineError(f"study database of {layout.database}: {first_line(cause)}{by_whom}{then}") from None
    except BrokenPipeError:  # whoever read what is printed has read enough
        raise
    except OSError as error:
        if isinstance(error, TimeoutError) and error.errno is None:  # of a lock, not of a disk
            raise MachineError(f"{first_line(error)} for too long{then}") from None
        file = error.filename2 or error.filename
        ours = file is not None and Path(str(file)).is_relative_to(layout.storage_path)
        where = f"--storage-path {layout.storage_path}: " if ours else ""
        raise MachineError(f"{where}{first_line(error)}{then}") from None


def is_database(uri: str, database: str) -> bool:
    """Whether `uri`, of any kind, is the PostgreSQL database of the URL `database`, whoever asks by whatever driver."""
    return _place(uri) == _place(database)


def _place(uri: str) -> tuple[str, int, str | None] | None:
    """Host, port and name of a PostgreSQL database; None for anything else."""
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return None
    if url.get_backend_name() != "postgresql":
        return None
    # Without a host PostgreSQL is asked on this machine, and without a name for the user's own database. Both may stand
    # in the query instead: the folder of a socket, or a list, which is taken as one name.
    host = str(url.host or url.query.get("host") or "localhost").lower()
    port = url.port or int(str(url.query.get("port", PORT)))
    return "localhost" if is_local(host) else host, port, url.database or url.username


def _file(layout: Layout, mode: str) -> tuple[str, dict[str, Any]]:
    """The URL for SQLAlchemy and its engine's arguments. A `mode` is SQLite's: ro, rw, rwc."""
    uri = f"file:{quote(str(layout.database_file))}?mode={mode}"
    # A path may hold signs that mean something in a URL.
    wait_s = READ_WAIT_S if mode == "ro" else WAIT_S
    connect = partial(sqlite3.connect, uri, uri=True, timeout=wait_s, check_same_thread=False)
    return f"sqlite:///{layout.database_file.name}", {"creator": connect}


def _server(database: str) -> tuple[str, dict[str, Any]]:
    """The URL for SQLAlchemy and its engine's arguments. UserError if it is none of PostgreSQL's."""
    try:
        url = make_url(database)
    except ArgumentError:
        raise UserError("--study-database: must be postgresql://USER@HOST/DATABASE") from None
    if url.get_backend_name() != "postgresql":
        raise UserError(f"--study-database {masked(database)}: must be postgresql://USER@HOST/DATABASE")
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername == "postgresql+psycopg" and importlib.util.find_spec("psycopg") is None:
        raise UserError("--study-database: needs the package psycopg: pip install 'bilora-ray[postgresql]'")
    # A connection may have died since it was last used, with the server or with a firewall's patience.
    engine = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}}
    return url.render_as_string(hide_password=False), engine
