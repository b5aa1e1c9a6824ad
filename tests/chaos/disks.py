"""Disks that a test fills, makes read-only or takes away."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

FILLER, BLOCK = "filler", 4096


class Disk:
    """A folder that can be taken away: a mount, or where mounting is not allowed, a folder that is renamed.

    Args:
        folder: of the disk; made here.
        size: of a disk in memory, in bytes; None: no limit.
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self.folder = folder
        self._away = folder.with_name("away")
        self._mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        folder.mkdir()
        if size is None:
            self._away.mkdir()
            self._mount = ["mount", "--bind", self._away, folder]
        done = subprocess.run(self._mount, capture_output=True, text=True)
        self.mounted, self.refusal = done.returncode == 0, done.stderr.strip()

    def fill(self, but_for: int = 0) -> None:
        """Leave only `but_for` bytes of a disk of some size."""
        size = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize - but_for
        with (self.folder / FILLER).open("wb") as file, contextlib.suppress(OSError):
            for _ in range(max(size, 0) // BLOCK):
                os.write(file.fileno(), bytes(BLOCK))

    def free(self) -> None:
        """Take what `fill` has put there away again."""
        (self.folder / FILLER).unlink()

    def forbid_writing(self) -> None:
        """Nobody may write there, who may do everything included."""
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)

    def remove(self) -> None:
        """The folder stays, and is empty."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=False)

    def take_away(self) -> None:
        """Whoever has a file open keeps it."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=True)
        else:
            self._away.rmdir()
            self.folder.rename(self._away)

    def bring_back(self) -> None:
        """What was in the folder is there again."""
        if self.mounted:
            subprocess.run(self._mount, check=True)
        else:
            self._away.rename(self.folder)
