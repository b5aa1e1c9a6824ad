"""The storage path full, slow or gone under a search: one clear line, nothing torn, and --resume finishes it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.disks import Disk
from chaos.searches import Search, kill_searches
from chaos.soundness import assert_resumed, assert_sound, torn
from tiny_trials import Tiny, reproducible, run_fit

pytestmark = pytest.mark.slow
DISK_BYTES = 24 * 1024**2
# Imported by every Python process that finds it on its path: the search, the cluster and the trials.
SLOW = """
import os, time

def slowed(call):
    def wrapped(*arguments, **options):
        time.sleep(0.2)
        descriptor = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b".")
        os.close(descriptor)
        return call(*arguments, **options)
    return wrapped

os.fsync, os.rename, os.replace = slowed(os.fsync), slowed(os.rename), slowed(os.replace)
"""


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", getattr(request, "param", None))
    yield made
    kill_searches()
    made.remove()


def assert_ends_with_a_line(search: Search, process: subprocess.Popen[bytes], *reasons: str) -> None:
    """It ends by itself with code 2 and one line that has one of the `reasons`, and says how to go on."""
    assert search.ends(process) == 2, search.log
    (line,) = [line for line in search.log.splitlines() if line.startswith("Error: ")]
    assert any(reason in line for reason in reasons), line
    assert line.endswith("; mend that and go on with --resume")
    assert "Traceback" not in search.log


@pytest.mark.parametrize("disk", [DISK_BYTES], indirect=True)
def test_a_full_disk_stops_the_search_and_a_resume_finishes_it(tiny: Tiny, tmp_path: Path, disk: Disk) -> None:
    if not disk.mounted:
        pytest.skip(f"no disk can be mounted here: {disk.refusal}")
    search = Search(tmp_path, tiny, storage=disk.folder / "runs", num_trials=2, max_steps=300, eval_steps=10)
    process = search.start()
    search.wait(process, lambda: search.has_checkpoint(0))
    disk.fill()
    in_flight = search.in_flight()
    assert_ends_with_a_line(search, process, "No space left on device", "database or disk is full")
    assert list(torn(search)) == []
    disk.free()
    assert search.ends(search.start("--resume")) == 0, search.log
    assert_sound(search)
    assert_resumed(search, in_flight)


def test_a_slow_disk_changes_no_result(tiny: Tiny, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(log=str(log)))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    search = Search(tmp_path, tiny, num_trials=2, max_steps=20, environment={"PYTHONPATH": path})
    assert search.ends(search.start()) == 0, search.log
    assert_sound(search)
    study = search.study()
    evaluations = sum(len(record.history) for record in study.records())
    # A checkpoint is some files and their folder, and a rename.
    assert log.stat().st_size >= 4 * evaluations
    for record in study.records():
        reports, _ = run_fit(study.config(record.number), tmp_path / f"again-{record.number}")
        assert reproducible(record.history) == reproducible(reports)


def test_storage_that_goes_away_stops_the_search_and_is_not_made_anew(tiny: Tiny, tmp_path: Path, disk: Disk) -> None:
    search = Search(tmp_path, tiny, storage=disk.folder, max_steps=400, eval_steps=10)
    process = search.start()
    search.wait(process, lambda: search.has_checkpoint(0, 1))
    disk.take_away()
    assert_ends_with_a_line(search, process, "No such file or directory", "unable to open database file")
    assert not disk.folder.exists() or list(disk.folder.rglob("*")) == []
    disk.bring_back()
    in_flight = search.in_flight()
    assert list(torn(search)) == []
    assert search.ends(search.start("--resume")) == 0, search.log
    assert_sound(search)
    assert_resumed(search, in_flight)
