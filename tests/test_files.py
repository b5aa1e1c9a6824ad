"""Folders that are whole or not there, and errors that say which folder could not be written."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bilora_ray.files import LEFT_S, atomic_file, atomic_folder, temporary_folder

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def written_to_a_full_device() -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x")


def refused_by_safetensors() -> None:
    raise SafetensorError(FULL)


def refused_by_name() -> None:
    Path("/nowhere/at/all").write_text("x")


@pytest.mark.parametrize("write", [written_to_a_full_device, refused_by_safetensors])
def test_an_error_without_a_name_gets_that_of_the_folder_that_was_filled(
    write: Callable[[], None], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(tmp_path / "adapter"):
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "adapter"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [lambda path: atomic_folder(path / "a"), lambda path: temporary_folder()])
def test_an_error_with_a_name_keeps_it(folder: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, folder(tmp_path):
        refused_by_name()
    assert caught.value.filename == "/nowhere/at/all"


def test_what_safetensors_says_of_a_file_is_no_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), atomic_folder(tmp_path / "adapter"):
        raise SafetensorError("Error while deserializing header")
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_folder_is_named_and_removed() -> None:
    with pytest.raises(OSError, match="No space left") as caught, temporary_folder() as folder:
        written_to_a_full_device()
    assert caught.value.filename == str(folder)
    assert not folder.exists()


def test_two_threads_that_write_the_same_file_leave_one_that_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write("a" * 9000)
        second.write("b" * 90)
    assert path.read_text() == "a" * 9000  # which ended last
    assert os.listdir(tmp_path) == ["found.json"]


def test_a_link_stays_and_what_it_leads_to_is_whole(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (link := tmp_path / "found.json").symlink_to("elsewhere/found.json")
    for text in ("first", "second"):
        with atomic_file(link) as file:
            file.write(text)
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "found.json").read_text() == text
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, Path(f"/dev/fd/{os.open(pipe, os.O_WRONLY)}")):
        with atomic_file(path) as file:
            file.write(path.name)
        assert os.read(reading, 99).decode() == path.name
    assert pipe.is_fifo()


def test_what_went_wrong_first_is_told(tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()

    def replaced_by_a_file() -> None:
        folder.rename(tmp_path / "moved")
        folder.write_text("a file now")
        written_to_a_full_device()

    with pytest.raises(OSError, match="No space left"), atomic_file(folder / "file"):
        replaced_by_a_file()


def test_what_was_killed_long_ago_is_removed_and_what_others_have_begun_is_not(tmp_path: Path) -> None:
    old, new = f".page.{'0a' * 6}", f".page.{'1b' * 6}"
    for name in (old, new, ".page.swp", ".page.20260101"):
        (tmp_path / name).write_text("begun")
        os.utime(tmp_path / name, times=(0, time.time() - (1 if name == new else LEFT_S + 9)))
    (folder := tmp_path / f".all.{'2c' * 6}").mkdir()
    os.utime(folder, times=(0, 0))
    with atomic_file(tmp_path / "page") as file:
        file.write("whole")
    with atomic_folder(tmp_path / "all"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([new, ".page.swp", ".page.20260101", "page", "all"])
