"""Files that other processes read: held by one at a time, whole or not there, readable by whom their folder is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

# How Rust tells which error of the system's it met.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")

# What was begun, and not touched for so long, is nobody's any more.
LEFT_S = 24 * 3600.0


@contextlib.contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file `path` for the block; the system frees it however the process ends.

    Who only looks whether it is held, with `is_held`, does not keep anybody from it.

    Raises:
        FileNotFoundError: its folder does not exist.
        TimeoutError: another process still holds it after `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline and is_held(path):
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(0.1)
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path` now. Needs no right to write it."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends and vanishes if it raises.

    Raises:
        FileNotFoundError: the folder that `path` is to be in does not exist.
        OSError: it cannot be written; the error names a file.
    """
    unfinished = unfinished_beside(path)
    unfinished.mkdir()
    try:
        with _naming(path):
            yield unfinished
            for path_inside in (*unfinished.rglob("*"), unfinished):
                _sync(path_inside)
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            _sync(path.parent)
    except BaseException:  # Ctrl-C and a stopped trial too: nothing half-written stays, and all is raised again
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """A text file to write, which becomes `path` when the block ends and vanishes if it raises.

    Of a link it becomes what that leads to. A pipe or a device is written to as it is.

    Raises:
        FileNotFoundError: the folder that `path` is to be in does not exist.
        OSError: it cannot be written; the error names a file.
    """
    if path.exists() and not path.is_file():
        with _naming(path), path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = path.resolve()
    unfinished = unfinished_beside(path)
    try:
        with _naming(path):
            with unfinished.open("x", encoding="utf-8") as file:
                yield file
            _sync(unfinished)
            unfinished.rename(path)
            _sync(path.parent)
    except BaseException:  # as for a folder
        with contextlib.suppress(OSError):  # what went wrong first is raised
            unfinished.unlink()
        raise


def unfinished_beside(path: Path) -> Path:
    """A new name for what becomes `path`, which no other thread, process or machine takes.

    What was killed before its end left one behind: those that nobody has touched for a day are removed.
    """
    names = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}")
    with contextlib.suppress(OSError):  # who is to write says what is wrong
        for entry in path.parent.iterdir():
            if names.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > LEFT_S:
                _remove(entry)
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_files(source: Path, target: Path) -> None:
    """Have the files of folder `source`, which nobody changes, in folder `target` too; copied, where it is far away."""
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except FileNotFoundError:
            raise
        except OSError:  # another disk, or one that has no links
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the block, where the system keeps what is temporary. OSError if that cannot be written."""
    with tempfile.TemporaryDirectory(prefix="bilora-ray-") as name, _naming(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in what goes wrong in the block that it was `path`: who writes to a file that is open is told no name.

    Raises:
        OSError: with the name of a file; safetensors' error about the system too.
    """
    try:
        yield
    except SafetensorError as error:
        found = SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def readable(folder: Path) -> None:
    """Let who may read `folder` read its files: safetensors makes its own for their owner alone."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # some mounts have no such modes
            file.chmod(folder.stat().st_mode & 0o666)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
