"""Several search processes on one study in PostgreSQL: each trial once, whoever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
from mlflow import MlflowClient
from postgresql import PASSWORD, Server, server
from tiny_trials import Tiny

from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import is_database, open_storage, study_names
from bilora_ray.search.study.studies import check_study, load_study, open_study

COMMAND = Path(sys.executable).with_name("bilora-ray")
PATIENCE_S = 240
SPACE = """
study: {{name: shared, num_trials: {num_trials}, scheduler: none}}
trial:
  model_name_or_path: {model}
  task: causal-lm
  train_data: {data}
  max_length: 64
  max_steps: {max_steps}
  eval_steps: 5
  rho: {{low: 0.01, high: 0.2, log: true}}
"""


@pytest.fixture(scope="module")
def database() -> Iterator[Server]:
    with server() as running:
        yield running


def write_space(folder: Path, tiny: Tiny, num_trials: int, max_steps: int = 40) -> None:
    data, model = tiny.folder / "texts-train.jsonl", tiny.model("causal-lm")
    text = SPACE.format(num_trials=num_trials, max_steps=max_steps, model=model, data=data)
    (folder / "space.yaml").write_text(text)


def new_database(database: Server, name: str) -> str:
    with psycopg.connect(database.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return database.url.removesuffix("postgres") + name


def start(folder: Path, url: str, *options: str) -> subprocess.Popen[bytes]:
    command = [COMMAND, "tune", "--space", "space.yaml", "--max-concurrent", "1", *options]
    places = {"BILORA_RAY_STUDY_DATABASE": url, "MLFLOW_TRACKING_URI": mlflow_uri(url)}
    with (folder / "log").open("ab") as log:
        environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)


def mlflow_uri(url: str) -> str:
    """MLflow's database beside that of the studies."""
    return url.replace("://", "+psycopg://") + "_mlflow"


def running(url: str) -> int:
    """How many trials of the study run, and have told of an evaluation; 0 before there is a study."""
    state = [optuna.trial.TrialState.RUNNING]
    try:
        storage = optuna.storages.RDBStorage(url.replace("://", "+psycopg://"))
    except Exception:  # being made at this moment
        return 0
    try:
        study = optuna.load_study(study_name="shared", storage=storage)
        return sum(bool(trial.intermediate_values) for trial in study.get_trials(states=state))
    except KeyError:  # not there yet
        return 0
    finally:  # each has connections of its own, and the server not many
        storage.engine.dispose()


def wait_for(url: str, count: int, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while running(url) < count:
        assert time.monotonic() < deadline, log.read_text()
        assert all(process.poll() is None for process in processes), log.read_text()
        time.sleep(0.2)


@pytest.mark.slow
def test_searches_that_share_a_study_run_each_trial_once_although_one_is_killed(
    database: Server, tiny: Tiny, tmp_path: Path
) -> None:
    write_space(tmp_path, tiny, num_trials=8, max_steps=200)
    url, log = new_database(database, "two"), tmp_path / "log"
    new_database(database, "two_mlflow")
    first = start(tmp_path, url)
    wait_for(url, 1, [first], log)
    second = start(tmp_path, url, "--resume")
    # One trial at a time each: two that run are one of each.
    wait_for(url, 2, [first, second], log)
    first.kill()
    first.wait()
    third = start(tmp_path, url, "--resume")
    assert [process.wait(PATIENCE_S) for process in (second, third)] == [0, 0], log.read_text()

    study = load_study(Layout(tmp_path / "runs", url), "shared")
    assert [record.status for record in study.records()] == [Status.COMPLETE] * 8
    assert any(study.folder(record.number).state()["resumed_at"] for record in study.records())
    for record in study.records():
        assert [metrics["step"] for metrics in record.history] == list(range(5, 201, 5))
    runs = mlflow_runs(url)
    assert [run.info.status for run in runs] == ["FINISHED"] * 9
    numbers = [run.data.tags["bilora_ray.trial"] for run in runs if "bilora_ray.trial" in run.data.tags]
    assert sorted(map(int, numbers)) == list(range(8))
    assert PASSWORD not in log.read_text()


def mlflow_runs(url: str) -> list:
    client = MlflowClient(mlflow_uri(url))
    experiment = client.get_experiment_by_name("bilora-ray")
    return list(client.search_runs([experiment.experiment_id]))


@pytest.mark.slow
def test_a_search_that_loses_its_database_says_so_and_can_go_on(database: Server, tiny: Tiny, tmp_path: Path) -> None:
    write_space(tmp_path, tiny, num_trials=2, max_steps=100)
    url, log = new_database(database, "lost"), tmp_path / "log"
    process = start(tmp_path, url, "--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    wait_for(url, 1, [process], log)
    database.stop()
    try:
        assert process.wait(PATIENCE_S) == 2, log.read_text()
    finally:
        database.start()
    line = log.read_text().strip().splitlines()[-1]
    shown = url.replace(PASSWORD, "***")
    assert line.startswith(f"Error: study database of {shown}: ")
    assert line.endswith("; mend that and go on with --resume")
    assert "Traceback" not in log.read_text()
    again = start(tmp_path, url, "--resume", "--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert again.wait(PATIENCE_S) == 0, log.read_text()
    study = load_study(Layout(tmp_path / "runs", url), "shared")
    assert [record.status for record in study.records()] == [Status.COMPLETE] * 2


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("mysql://u@h/d", "--study-database mysql://u@h/d: must be postgresql://USER@HOST/DATABASE"),
        ("studies", "--study-database: must be postgresql://USER@HOST/DATABASE"),
        (
            "postgresql://u:secret@127.0.0.1:1/d",
            "--study-database postgresql://u:***@127.0.0.1:1/d: cannot be used (connection failed: "
            'connection to server at "127.0.0.1", port 1 failed: Connection refused)',
        ),
    ],
)
def test_a_database_that_will_not_do_is_named(url: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_storage(Layout(tmp_path, url))
    assert str(error.value) == line


def test_the_studies_database_is_not_offered_to_mlflow(database: Server, tiny: Tiny, tmp_path: Path) -> None:
    write_space(tmp_path, tiny, num_trials=1)
    process = start(tmp_path, database.url, "--mlflow-uri", database.url.replace("://", "+psycopg://"))
    assert process.wait(PATIENCE_S) == 2
    shown = database.url.replace("://", "+psycopg://").replace(PASSWORD, "***")
    line = f"Error: --mlflow-uri {shown}: holds the studies; MLflow needs a database of its own\n"
    # On a slow machine it is said before what takes seconds.
    assert (tmp_path / "log").read_text().endswith(line)
    assert study_names(Layout(tmp_path / "runs", database.url)) == []


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("postgresql://u@h/d", True),
        ("postgresql+psycopg://other:secret@h:5432/d?sslmode=require", True),
        ("postgresql://u@H/d", True),
        ("postgresql://u@h:5433/d", False),
        ("postgresql://u@h2/d", False),
        ("postgresql://u@h/d_mlflow", False),
        ("mysql://u@h:5432/d", False),
        ("sqlite:///d", False),
        ("http://h:5432/d", False),
        ("postgresql://u@h:port/d", False),
        ("databricks", False),
    ],
)
def test_a_database_is_known_by_its_host_port_and_name(uri: str, same: bool) -> None:
    assert is_database(uri, "postgresql://u@h/d") is same


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", ""])
def test_this_machine_has_several_names(host: str) -> None:
    assert is_database(f"postgresql+psycopg://{host}/d", "postgresql://u@localhost:5432/d")


def test_another_storage_path_is_refused(database: Server, tiny: Tiny, tmp_path: Path) -> None:
    write_space(tmp_path, tiny, num_trials=1)
    url = new_database(database, "elsewhere")
    space = load_space(tmp_path / "space.yaml")
    open_study(space, Layout(tmp_path / "runs", url), {})
    check_study(space, Layout(tmp_path / "runs", url), True, {})
    with pytest.raises(UserError) as error:
        check_study(space, Layout(tmp_path / "others", url), True, {})
    shown = url.replace(PASSWORD, "***")
    assert str(error.value) == (
        f"--storage-path {tmp_path / 'others'}: study 'shared' of {shown} keeps its trials in another folder"
    )


def test_of_two_first_starts_from_different_storage_paths_one_is_refused(
    database: Server, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study = optuna.create_study

    def late(**arguments: Any) -> optuna.Study:
        time.sleep(1)  # both have looked for the study by now, unless one is kept waiting
        return create_study(**arguments)

    write_space(tmp_path, tiny, num_trials=1)
    url, space = new_database(database, "twice"), load_space(tmp_path / "space.yaml")
    monkeypatch.setattr(optuna, "create_study", late)
    with ThreadPoolExecutor() as threads:
        starts = [threads.submit(open_study, space, Layout(tmp_path / name, url), {}) for name in ("one", "other")]
    refused = [start.exception() for start in starts if start.exception()]
    (error,) = refused
    assert isinstance(error, UserError)
    assert "keeps its trials in another folder" in str(error)


def test_a_process_has_few_connections_whatever_it_asks(database: Server, tmp_path: Path) -> None:
    layout = Layout(tmp_path, new_database(database, "few"))
    kept = [open_storage(layout) for _ in range(5)]
    assert [study_names(layout) for _ in kept] == [[]] * 5
    with psycopg.connect(database.url) as connection:
        (count,) = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = 'few'").fetchone() or (0,)
    assert count <= 2
