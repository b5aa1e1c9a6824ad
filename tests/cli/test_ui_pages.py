"""Which page `bilora-ray ui` begins with; Optuna's pages, which change nothing; MLflow's in a browser, by clicks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

import pytest
from chaos.nodes import free_port
from click.testing import CliRunner
from mlflow_server import Server

from bilora_ray.cli import ui
from bilora_ray.cli.main import main
from bilora_ray.errors import UserError
from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.steering import dashboard
from bilora_ray.search.study.studies import open_study
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri, ui_address
from bilora_ray.tracking.study_runs import StudyInfo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SPACE = ["study.name=s", "model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "rho={choice: [0.1]}"]


def tracked(runs: Path, name: str, adapter: Path | None = None) -> None:
    objectives = (Objective("eval_loss", greater_is_better=False),)
    study = StudyInfo(name, {}, {}, {}, objectives, ("rank",), runs, runs / "report.html")
    tracker = MlflowTracker.open(default_uri(runs), "bilora-ray", runs / "mlflow-artifacts", study, print)
    trials = []
    for number, loss in enumerate((0.5, 0.25, 0.75)):
        history = ({"step": 1, "max_steps": 1, "eval_loss": loss},)
        settings = {"metric": "eval_loss", "rank": 4 + number}
        trials.append(
            TrialRecord(number, Status.COMPLETE, settings, {"rank": 4 + number}, history, loss, None, adapter)
        )
    tracker.close(trials, 1, interrupted=False)


def test_the_first_page_is_the_table_of_the_newest_studys_trials(tmp_path: Path) -> None:
    tracked(tmp_path, "first")
    first = ui_address(default_uri(tmp_path), 5000)
    assert re.fullmatch(
        r"http://127.0.0.1:5000/#/experiments/1/runs\?workflowType=machine_learning&viewStateShareKey=\w{32}", first
    )
    tracked(tmp_path, "second")
    assert ui_address(default_uri(tmp_path), 5000) != first
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        connection.execute("DELETE FROM experiment_tags")  # as of runs that an older version made
    assert ui_address(default_uri(tmp_path), 5000).endswith("/#/experiments?workflowType=machine_learning")


def asked(app: object, method: str, path: str) -> tuple[str, bytes]:
    """What a WSGI application answers."""
    environment: dict[str, object] = {}
    setup_testing_defaults(environment)
    environment |= {"REQUEST_METHOD": method, "PATH_INFO": path}
    said: list[str] = []
    body = b"".join(app(environment, lambda status, headers, error=None: said.append(status)))  # type: ignore[operator]
    return said[0], body


@pytest.mark.parametrize("pages", ["mlflow", "optuna"])
def test_where_others_share_the_machine_it_is_told_what_they_can_do(
    pages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked(tmp_path, "first")
    open_study(load_space(None, SPACE), Layout(tmp_path), {}).release()
    monkeypatch.setattr(os, "execve", lambda *_: None)
    monkeypatch.setattr(dashboard, "serve", lambda *_: None)
    monkeypatch.setattr(dashboard, "check_dashboard_is_there", lambda: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def told(*accounts: tuple[int, str]) -> list[str]:
        known = [SimpleNamespace(pw_uid=uid, pw_shell=shell) for uid, shell in accounts]
        monkeypatch.setattr(ui.pwd, "getpwall", lambda: known)
        option = ["--optuna"] if pages == "optuna" else []
        result = CliRunner().invoke(main, ["ui", "--storage-path", str(tmp_path), "--port", str(free_port()), *option])
        assert result.exit_code == 0, result.output
        return [line for line in result.stderr.splitlines() if line.startswith("Note: ")]

    monkeypatch.setattr(ui, "PEOPLE", (10**6, 10**7))  # of whom none has a process here
    assert told((0, "/bin/sh"), (10**6 + 1, "/usr/sbin/nologin"), (os.getuid(), "/bin/sh")) == []
    can = (
        "look at it too" if pages == "optuna" else "open it too, and change or remove runs: MLflow asks for no password"
    )
    assert told((10**6 + 1, "/bin/bash")) == [f"Note: the other users of this machine can {can}"]


def test_who_has_a_process_here_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui.pwd, "getpwall", list)
    monkeypatch.setattr(ui, "PEOPLE", (0, 65534))
    own = os.getuid()
    assert own not in ui._others()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert own in ui._others()


@pytest.mark.skipif(importlib.util.find_spec("optuna_dashboard") is None, reason="needs optuna-dashboard")
def test_optunas_pages_show_the_studies_and_can_change_nothing(tmp_path: Path) -> None:
    from optuna_dashboard import wsgi

    layout = Layout(tmp_path)
    open_study(load_space(None, SPACE), layout, {}).release()
    before = layout.database_file.read_bytes()
    pages = wsgi(dashboard.storage_to_look_at(layout))
    status, body = asked(pages, "GET", "/api/studies")
    assert status.startswith("200")
    assert [study["study_name"] for study in json.loads(body)["study_summaries"]] == ["s"]
    assert asked(pages, "DELETE", "/api/studies/1")[0].startswith("500")
    assert layout.database_file.read_bytes() == before
    open_study(load_space(None, ["study.name=t", *SPACE[1:]]), layout, {}).release()  # and it is no copy
    assert len(json.loads(asked(pages, "GET", "/api/studies")[1])["study_summaries"]) == 2


def test_what_optunas_pages_need_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no studies here yet"):
        dashboard.storage_to_look_at(Layout(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["ui", "--optuna", "--storage-path", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --optuna: needs the package optuna-dashboard: pip install 'bilora-ray[dashboard]'\n"
    )


def test_postgresql_is_told_that_nothing_is_written() -> None:
    url = dashboard._reading_only("postgresql://me@host/studies")
    assert url == "postgresql://me@host/studies?options=-c+default_transaction_read_only%3Don"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright")
def test_the_best_adapters_path_is_one_click_from_the_first_page(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    adapter = tmp_path / "step-00000001"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    tracked(tmp_path / "runs", "s", adapter)
    command = [str(Path(sys.executable).with_name("bilora-ray")), "ui", "--storage-path", str(tmp_path / "runs")]
    port = free_port()
    with Server([*command, "--port", str(port)], {}, port), sync_playwright() as browsers:
        page = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.goto(ui_address(default_uri(tmp_path / "runs"), port))
        first = page.get_by_role("link", name=re.compile(r"^trial \d")).first
        assert first.inner_text() == "trial 1: r5"
        first.click()
        page.get_by_text(str(adapter)).first.wait_for()
        assert "The best of its study." in page.inner_text("body")
