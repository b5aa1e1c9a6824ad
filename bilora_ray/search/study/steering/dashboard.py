"""optuna-dashboard over the studies, which it can look at and not change."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from bilora_ray.errors import UserError
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import read_storage

READ_ONLY = "-c default_transaction_read_only=on"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Not a line for each request."""


def check_dashboard_is_there() -> None:
    """UserError if optuna-dashboard is not installed."""
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise UserError("--optuna: needs the package optuna-dashboard: pip install 'bilora-ray[dashboard]'")


def storage_to_look_at(layout: Layout) -> RDBStorage:
    """The studies, live, in a database that refuses to be written. UserError where no study was ever begun.

    A SQLite file is opened to be read; PostgreSQL is told that each transaction reads only. What a person would change
    in the dashboard is refused by the database.
    """
    if layout.study_database is not None:
        layout = replace(layout, study_database=_reading_only(layout.study_database))
    read_storage(layout)  # which may have to undo what a killed process left half-written, and then writes
    storage = read_storage(layout)
    if storage is None:
        raise UserError(f"{layout.database}: no studies here yet; `bilora-ray tune` makes them")
    return storage


def serve(storage: RDBStorage, port: int) -> None:
    """Serve the dashboard on 127.0.0.1, until Ctrl-C."""
    from optuna_dashboard import wsgi

    logging.getLogger("optuna_dashboard").setLevel(logging.CRITICAL)
    with make_server("127.0.0.1", port, wsgi(storage), _Server, _Quiet) as server:
        server.serve_forever()


def _reading_only(database: str) -> str:
    try:
        url = make_url(database)
    except ArgumentError:
        return database  # which `read_storage` refuses
    own = url.query.get("options", "")  # such as a schema
    options = " ".join([*([own] if isinstance(own, str) else own), READ_ONLY]).strip()
    return url.update_query_dict({"options": options}).render_as_string(hide_password=False)
