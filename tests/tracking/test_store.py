"""Which MLflow URIs will do: what is wrong with another is said in one line, before the search."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from bilora_ray.errors import UserError
from bilora_ray.tracking.mlflow_tracker import default_uri
from bilora_ray.tracking.store import CREDENTIALS, seen, unprotected

from .tracked import Project

OPEN = """
import sys
from pathlib import Path
from bilora_ray.records import Objective
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri
from bilora_ray.tracking.study_runs import StudyInfo
folder = Path(sys.argv[1])
study = StudyInfo(sys.argv[2], {}, {}, {}, (Objective("eval_loss", False),), (), folder, folder / "report.html")
MlflowTracker.open(default_uri(folder), "project", folder / "mlflow-artifacts", study, print)
"""


def _error(project: Project, uri: str, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        project.open(uri=uri, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_server_that_is_not_there(project: Project, port: int, scheme: str) -> None:
    uri = f"{scheme}://127.0.0.1:{port}"
    assert _error(project, uri) == f"--mlflow-uri {uri}: MLflow does not answer (connection refused)"


def test_server_that_never_answers(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert _error(project, uri) == f"--mlflow-uri {uri}: MLflow does not answer (no answer in time)"


@pytest.mark.parametrize("uri", ["http://[::1", "http://", "http://127.0.0.1:99999", "postgresql://127.0.0.1:99999"])
def test_malformed_uri(project: Project, uri: str) -> None:
    assert _error(project, uri).startswith(f"--mlflow-uri {uri}: MLflow does not answer (")


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "file:///data/mlruns"])
def test_file_store(project: Project, uri: str) -> None:
    error = _error(project, uri)
    assert error.startswith(f"--mlflow-uri {uri}: MLflow keeps no runs in plain folders any more; name a file, as in ")
    assert error.endswith("/mlruns/mlflow.db")
    assert "sqlite:////" in error


def test_unknown_scheme(project: Project) -> None:
    assert _error(project, "htp://host:5000") == (
        "--mlflow-uri htp://host:5000: unknown scheme 'htp'; did you mean 'http'?"
    )


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_sqlite_without_a_file(project: Project, uri: str) -> None:
    assert "names no file" in _error(project, uri)


def test_file_in_place_of_a_folder(project: Project, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    uri = default_uri(tmp_path / "taken")
    assert _error(project, uri) in {
        f"--mlflow-uri {uri}: cannot be written (not a directory)",
        f"--mlflow-uri {uri}: cannot be written (file exists)",
    }
    assert "cannot be written" in _error(project, project.uri, artifact_root=tmp_path / "taken" / "artifacts")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(project: Project, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    uri = default_uri(tmp_path)
    assert _error(project, uri) == f"--mlflow-uri {uri}: cannot be written (permission denied)"


def test_file_that_is_no_database(project: Project, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    uri = default_uri(tmp_path)
    assert _error(project, uri) == f"--mlflow-uri {uri}: cannot be written (file is not a database)"


def test_database_that_another_process_holds(project: Project, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilora_ray.tracking.store.PROBE_TIMEOUT_S", 0.1)
    other = sqlite3.connect(storage / "mlflow.db")
    try:
        other.execute("BEGIN IMMEDIATE")
        assert _error(project, project.uri) == f"--mlflow-uri {project.uri}: cannot be written (database is locked)"
    finally:
        other.close()


def test_deleted_project(project: Project) -> None:
    project.open()
    project.client.delete_experiment(project.parent().info.experiment_id)
    assert "was deleted in MLflow" in _error(project, project.uri)


def test_settings_of_a_user_stay(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    project.open()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "9"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "4"


def test_password_is_not_shown(project: Project, port: int) -> None:
    assert "secret" not in _error(project, f"postgresql://me:secret@127.0.0.1:{port}/runs")


def test_server_on_another_machine_without_a_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in {name for names in CREDENTIALS for name in names}:
        monkeypatch.delenv(name, raising=False)
    for uri in ("http://host:5000", "https://me@host", "http://127.0.0.1.evil.org", "http://192.168.1.2:5000"):
        assert unprotected(uri)
    for uri in ("http://127.0.0.1:5000", "http://localhost:5000", "http://[::1]:5000", "https://me:secret@host"):
        assert not unprotected(uri)
    for uri in ("sqlite:////runs/mlflow.db", "postgresql://me@host/runs", "databricks"):
        assert not unprotected(uri)


@pytest.mark.parametrize("names", CREDENTIALS, ids="+".join)
def test_credentials_that_mlflow_takes_protect_a_server(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in {name for all_names in CREDENTIALS for name in all_names}:
        monkeypatch.delenv(name, raising=False)
    for name in names:
        assert unprotected("http://host:5000")
        monkeypatch.setenv(name, "x")
    assert not unprotected("http://host:5000")


def test_mlflows_own_file_of_credentials_protects_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\n")
    assert not unprotected("http://host:5000")


class _Protected(BaseHTTPRequestHandler):
    """Has no experiments, and tells so whoever brings the password; all else is not found."""

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers["Authorization"] == f"Basic {b64encode(b'me:secret').decode()}"
        found = known and self.path.partition("?")[0] == "/api/2.0/mlflow/experiments/search"
        body = b'{"experiments": []}' if found else b"Not Found"
        self.send_response(200 if found else 404 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def protected() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Protected)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_with_the_password_that_its_uri_has(protected: str) -> None:
    assert seen(f"http://me:secret@{protected}") == f"http://me:***@{protected} answers"
    with pytest.raises(UserError, match=r"MLflow does not answer \(.*401"):
        seen(f"http://{protected}")


def test_a_web_server_that_is_none_of_mlflow_is_not_ok(protected: str) -> None:
    with pytest.raises(UserError, match=r"MLflow does not answer \(.*404") as caught:
        seen(f"http://me:secret@{protected}/elsewhere")
    assert "secret" not in str(caught.value)


def test_databricks_is_asked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DATABRICKS_HOST", raising=False)
    with pytest.raises(UserError, match=r"^--mlflow-uri databricks: MLflow does not answer \("):
        seen("databricks")


def test_a_file_that_could_not_be_made_is_not_ok(tmp_path: Path) -> None:
    assert seen(default_uri(tmp_path / "to be" / "made")).endswith("mlflow.db, made by the first search")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(not a directory\)$"):
        seen(default_uri(tmp_path / "taken" / "runs"))
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


@pytest.mark.slow
def test_two_searches_that_make_one_database_at_one_time(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    command = [sys.executable, "-c", OPEN, folder]
    processes = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in ("first", "second")
    ]
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    project = Project(default_uri(folder), "project", folder / "mlflow-artifacts")
    assert {run.info.run_name for run in project.runs()} == {"first", "second"}


def test_artifacts_follow_a_storage_path_that_was_renamed(storage: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copyfile(storage / "mlflow.db", old / "mlflow.db")
    project = Project(default_uri(old), "moved", old / "mlflow-artifacts")
    project.open()
    elsewhere = project.client.create_experiment("by hand", artifact_location=str(tmp_path / "a person's"))
    old.rename(new)
    moved = Project(default_uri(new), "moved", new / "mlflow-artifacts")
    tracker = moved.open()
    tracker.close([], None, interrupted=True)
    experiment = moved.client.get_experiment_by_name("moved")
    assert experiment is not None
    assert experiment.artifact_location == str(new / "mlflow-artifacts")
    run = moved.parent().info
    assert run.artifact_uri == f"{new / 'mlflow-artifacts'}/{run.run_id}/artifacts"
    moved.client.log_text(run.run_id, "kept", "note.txt")
    assert not old.exists()
    assert moved.client.get_experiment(elsewhere).artifact_location == str(tmp_path / "a person's")
    # Another place for the artifacts is as it was chosen.
    other = Project(default_uri(new), "moved", tmp_path / "other" / "mlflow-artifacts")
    other.open()
    assert other.client.get_experiment(experiment.experiment_id).artifact_location == str(new / "mlflow-artifacts")
