"""The commands that a study's end offers: with what was given, without what the environment gives, and no password."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from bilora_ray.cli.options import command_that_resumes, print_next

VARIABLES = {"mlflow_uri": "MLFLOW_TRACKING_URI", "study_database": "BILORA_RAY_STUDY_DATABASE"}


@pytest.fixture(autouse=True)
def _runs_and_nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    for runs in ("runs", "my runs"):
        (tmp_path / runs).mkdir()
        (tmp_path / runs / "mlflow.db").touch()


def told(capsys: pytest.CaptureFixture[str], **given: str) -> dict[str, str]:
    """What is printed -> its line."""
    storage_path, database = Path(given.get("storage_path", "runs")), given.get("study_database")
    print_next("s", storage_path, database, Path("adapter"), given.get("mlflow_uri"))
    return {line[:8].strip(): line[9:] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "bilora-ray ui"),
        ({"storage_path": "my runs"}, "bilora-ray ui --storage-path 'my runs'"),
        ({"mlflow_uri": "sqlite:///m.db"}, "bilora-ray ui --mlflow-uri sqlite:///m.db"),
        ({"mlflow_uri": "sqlite:///my m.db", "storage_path": "r"}, "bilora-ray ui --mlflow-uri 'sqlite:///my m.db'"),
        ({"mlflow_uri": "postgresql://u@h/d"}, "bilora-ray ui --mlflow-uri postgresql://u@h/d"),
        ({"mlflow_uri": "postgresql://u:SECRET@h/d"}, 'bilora-ray ui --mlflow-uri "$MLFLOW_TRACKING_URI"'),
        ({"mlflow_uri": "http://127.0.0.1:5000"}, "http://127.0.0.1:5000"),
        ({"mlflow_uri": "https://u:SECRET@h"}, "https://u:***@h"),
    ],
)
def test_browse_shows_the_store_that_was_given(
    given: dict[str, str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, **given)["Browse"] == line


def test_the_command_that_resumes_has_what_was_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bilora-ray", "train", "--study=s", "--set", "rho=0.1"])
    assert command_that_resumes("--trial=3") == "bilora-ray train --study=s --set rho=0.1 --trial=3 --resume"
    monkeypatch.setattr("sys.argv", ["bilora-ray", "train", "--study=s", "--trial", "3", "--resume"])
    assert command_that_resumes() == "bilora-ray train --study=s --trial 3 --resume"


@pytest.mark.parametrize(
    ("called", "words"),
    [
        ("bilora-ray", ["bilora-ray"]),
        (".venv/bin/bilora-ray", [".venv/bin/bilora-ray"]),
        ("/there/site-packages/bilora_ray/__main__.py", [sys.executable, "-m", "bilora_ray"]),
        ("/there/site-packages/pytest/__main__.py", ["bilora-ray"]),
    ],
)
def test_the_commands_that_are_told_begin_as_the_one_that_was_typed(
    called: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [called, "tune"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert command_that_resumes() == shlex.join([*words, "tune", "--resume"])
    assert told(capsys)["More"] == shlex.join([*words, "show", "s"])


def test_where_the_command_is_found_its_name_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bilora-ray"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for called in (str(script), "/there/site-packages/bilora_ray/__main__.py"):
        monkeypatch.setattr("sys.argv", [called, "tune"])
        assert command_that_resumes() == "bilora-ray tune --resume"


def test_a_store_that_is_not_there_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, storage_path="elsewhere").keys() == {"Adapter", "More", "Take it"}


@pytest.mark.parametrize("uri", ["postgresql://u@h/d", "postgresql://u:SECRET@h/d"])
def test_what_the_environment_gives_is_not_repeated(
    uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, uri)
    lines = told(capsys, mlflow_uri=uri, study_database=uri)
    assert (lines["Browse"], lines["More"]) == ("bilora-ray ui", "bilora-ray show s")


def test_an_adapter_below_the_current_folder_is_told_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for adapter, line in ((tmp_path / "runs" / "a", "runs/a"), (tmp_path.parent / "a", str(tmp_path.parent / "a"))):
        adapter.mkdir()
        print_next("s", Path("runs"), None, adapter)
        assert capsys.readouterr().out.startswith(f"Adapter  {line}\n")


def test_an_adapter_that_is_gone_is_said_to_be_and_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    (Path("adapter")).rmdir()
    lines = told(capsys)
    assert lines["Adapter"] == "gone; it was in adapter"
    assert "Take it" not in lines


def test_the_study_database_is_named_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, study_database="postgresql://u@h/d")["More"].endswith("--study-database postgresql://u@h/d")
    secret = told(capsys, study_database="postgresql://u:SECRET@h/d")
    assert secret["More"] == 'bilora-ray show s --study-database "$BILORA_RAY_STUDY_DATABASE"'
