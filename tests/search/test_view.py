"""Who may only read a storage path reads it: a study is shown and listed, and nothing is written."""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from optuna.exceptions import StorageInternalError
from safetensors.numpy import save_file
from tiny_trials import next_trial

from bilora_ray.cli.main import main
from bilora_ray.files import is_held, locked
from bilora_ray.recipe import write_recipe
from bilora_ray.records import Status
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import open_storage, read_storage, study_names
from bilora_ray.search.study.studies import (
    check_study,
    load_study,
    num_trials_before,
    open_study,
    settings_before,
    summarise,
)
from bilora_ray.search.study.study import SearchStudy

SPACE = load_space(
    None,
    [
        "study.name=s",
        "study.num_trials=4",
        "study.scheduler=none",
        "trial.model_name_or_path=org/model",
        "trial.task=causal-lm",
        "trial.train_data=org/data",
        "trial.rho={low: 0.01, high: 0.2}",
    ],
)
NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of this machine may read; pytest's own are for who runs the tests."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def study(open_folder: Path) -> Iterator[SearchStudy]:
    """Of three trials the first is complete, the second runs, and the third was interrupted."""
    study = open_study(SPACE, Layout(open_folder / "r&u#n s"), {})
    other = open_study(SPACE, study.layout, {})
    assert [next_trial(study), next_trial(study), next_trial(other)] == [0, 1, 2]
    checkpoint, adapter = study.folder(0).checkpoint_at(1), study.folder(0).adapter_at(1)
    metrics = {"step": 1, "max_steps": 1, "eval_loss": 1.0}
    for folder in (checkpoint, adapter):
        folder.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"history": [metrics], "best_step": 1}))
    write_recipe(adapter, study.config(0), {"step": 1})
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "org/model"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, adapter / "adapter_model.safetensors")
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    study.report(0, metrics)
    other.release()
    yield study
    study.release()


@contextmanager
def as_a_reader(folder: Path) -> Iterator[None]:
    """For the block, this process may read `folder` and write nothing in it, whoever it is otherwise."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222 | 0o444)
    if root := os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError):
            (folder / "new").touch()
        yield
    finally:
        if root:
            os.seteuid(0)


def run(layout: Layout, *words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "--storage-path", str(layout.storage_path)])


def seen(layout: Layout, folder: Path) -> list[Any]:
    """All that can be read of a study."""
    shown, listed = run(layout, "show", "s", "--json"), run(layout, "show", "--json")
    exported = run(layout, "export", "s", "--output", folder / "adapter")
    table = run(layout, "show", "s")
    for result in (shown, listed, table):
        assert (result.exit_code, result.stderr) == (0, "")
    unread = "what was written was not loaded and compared: the base model org/model is not on this machine"
    assert (exported.exit_code, exported.stderr) == (0, f"Note: {unread}\n")
    check_study(SPACE, layout, True, {})
    recipe = json.loads((folder / "adapter" / "bilora_ray.json").read_text())
    return [
        [trial["status"] for trial in json.loads(shown.stdout)["trials"]],
        json.loads(listed.stdout)[0]["ended"],
        (recipe["study"], recipe["trial"], recipe["eval_loss"]),
        num_trials_before(layout, "s"),
        (settings_before(layout, "s") or {})["task"],
        [summary.study for summary in summarise(layout)],
    ]


SEEN = [["complete", "running", "interrupted"], 1, ("s", 0, 1.0), 4, "causal-lm", ["s"]]


def test_who_may_only_read_sees_all_that_there_is(study: SearchStudy, open_folder: Path) -> None:
    first, second = (open_folder / name for name in "ab")
    first.mkdir()
    second.mkdir()
    assert seen(study.layout, first) == SEEN  # and what is imported late is there, wherever it lies
    second.chmod(0o777)
    with as_a_reader(study.layout.storage_path):
        assert seen(study.layout, second) == SEEN


def test_reading_writes_nothing_and_opens_nothing_to_write(
    study: SearchStudy, open_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = study.layout.storage_path

    def snapshot() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, _content(path)) for path in (storage, *storage.rglob("*"))}

    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
            mode = kwargs.get("mode", args[0] if args else "r")
            inside = isinstance(path, str | Path) and Path(path).is_relative_to(storage)
            assert not inside or (mode in ("r", "rb") if isinstance(mode, str) else mode & 3 == os.O_RDONLY), path
            return call(path, *args, **kwargs)

        return opened

    before = snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refusing(open))
        patch.setattr("io.open", refusing(open))
        patch.setattr(os, "open", refusing(os.open))
        assert seen(study.layout, tmp_path) == SEEN
    assert snapshot() == before


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_where_no_study_is_there_is_nothing_and_nothing_is_made(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "runs")
    layout.storage_path.mkdir()
    assert json.loads(run(layout, "show", "--json").stdout) == []
    assert run(layout, "show", "s").stderr == f"Error: study 's': not in {layout.storage_path}\n"
    assert list(layout.storage_path.iterdir()) == []
    layout.database_file.touch()  # whose maker was killed
    assert study_names(layout) == []
    assert layout.database_file.read_bytes() == b""


def test_a_database_is_read_while_it_is_written(study: SearchStudy) -> None:
    with closing(sqlite3.connect(study.layout.database_file, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE studies SET study_name = 't'")
        assert study_names(study.layout) == ["s"]


def test_a_database_whose_writer_was_killed_is_read_by_who_may_write(study: SearchStudy) -> None:
    amid = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size=1")
connection.execute("BEGIN")
connection.execute("CREATE TABLE large (x)")
connection.executemany("INSERT INTO large VALUES (?)", [("x" * 1000,)] * 1000)
os._exit(0)
"""
    layout = study.layout
    subprocess.run([sys.executable, "-c", amid, layout.database_file], check=True)
    journal = Path(f"{layout.database_file}-journal")
    assert journal.stat().st_size > 0
    with as_a_reader(layout.storage_path):
        result = run(layout, "show", "s")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: --storage-path {layout.storage_path}: Permission denied: ")
    for path in (layout.storage_path, *layout.storage_path.rglob("*")):
        path.chmod(0o755)
    assert study_names(layout) == ["s"]
    assert not journal.exists()


def test_what_is_read_cannot_be_written(study: SearchStudy) -> None:
    storage = read_storage(study.layout)
    assert storage is not None
    with pytest.raises(StorageInternalError) as error:
        storage.set_study_user_attr(1, "a", "b")
    assert "readonly database" in str(error.value.__cause__)
    open_storage(study.layout).set_study_user_attr(1, "a", "b")


def test_a_lock_is_told_to_be_held_and_is_not_kept_from_who_wants_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not is_held(lock)
    assert not lock.exists()
    with locked(lock, 0):
        assert is_held(lock)
    assert not is_held(lock)
    with lock.open() as looked, ThreadPoolExecutor() as threads:  # for as long as a look takes
        fcntl.flock(looked, fcntl.LOCK_SH)
        assert not is_held(lock)

        def take() -> bool:
            with locked(lock, 0):
                return is_held(lock)

        taken = threads.submit(take)
        with pytest.raises(TimeoutError):
            taken.result(timeout=0.3)
        fcntl.flock(looked, fcntl.LOCK_UN)
        assert taken.result(timeout=20)


def test_a_trial_that_is_about_to_be_claimed_is_not_interrupted(study: SearchStudy) -> None:
    layout, view = study.layout, load_study(study.layout, "s")
    with ThreadPoolExecutor() as threads:
        with layout.choosing("s"):
            number = study.study.ask().number
            shown = threads.submit(view.records_now)
            with pytest.raises(TimeoutError):
                shown.result(timeout=0.3)
            study._claims.take(number)
        statuses = [record.status for record in shown.result(timeout=20)]
    assert statuses == [Status.COMPLETE, Status.RUNNING, Status.INTERRUPTED, Status.RUNNING]
