"""The folder of one trial: what is in it, read and made without torch.

lock                          held by the process that trains
checkpoints/step-00000120/    tensors.safetensors and state.json; only complete ones carry such a name
adapters/step-00000090/       the best adapter so far, as PEFT writes it
                              of a trial that goes on from another's, the first one is that one's: see `begin_from`
moving.json                   what the trial does between evaluations, for who watches: it may be torn, or missing
scratch/                      what whoever runs the trial keeps while it runs
../passes.json                the largest passes that have room, where larger ones have not
../examples/                  of data too large for the memory: the tokenized rows, which the trials of a study share
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bilora_ray.errors import MachineError
from bilora_ray.files import atomic_folder, link_files, locked
from bilora_ray.records import Moving

EXAMPLES = "examples"
STATE = "state.json"
MOVING = "moving.json"
TENSORS = "tensors.safetensors"
# Of a checkpoint that another trial wrote: the settings that have other values from there on.
CHANGED = "changed"
# Ends the name of what is being removed.
GONE = ".gone"
# A killed search's worker may write for some seconds more; its successor waits for that.
ORPHAN_WAIT_S = 60.0
COMPLETE = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrialFolder:
    """Where a trial keeps its checkpoints and its best adapter."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint_at(self, step: int) -> Path:
        """The checkpoint of `step`, whether or not it exists."""
        return self.checkpoints / f"step-{step:08d}"

    @property
    def adapters(self) -> Path:
        """Folder of the best adapter."""
        return self.path / "adapters"

    def adapter_at(self, step: int) -> Path:
        """The adapter of `step`, whether or not it exists."""
        return self.adapters / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = _complete(self.checkpoints)
        return complete[-1] if complete else None

    def state(self) -> dict[str, Any]:
        """Counters and evaluations of the newest checkpoint; empty before the first one. MachineError if it is torn."""
        for _ in range(3):
            newest = self.latest()
            if newest is None:
                return {}
            with contextlib.suppress(FileNotFoundError):  # the trial has just put a newer one in its place
                return _parsed(newest / STATE)
        return {}

    def begin_from(self, checkpoint: Path, changed: Mapping[str, Any]) -> None:
        """Have the trial go on from another one's checkpoint, with its counters, and none of its evaluations.

        Args:
            checkpoint: a complete one.
            changed: setting -> its value from there on, of those that are not as they were.

        Raises:
            FileNotFoundError: it is not there.
        """
        state = _parsed(checkpoint / STATE)
        own: dict[str, Any] = {
            "history": [],
            "best_step": None,
            "best_value": None,
            "resumed_at": [],
            CHANGED: dict(changed),
        }
        self.make()
        with atomic_folder(self.checkpoint_at(state["step"])) as unfinished:
            link_files(checkpoint, unfinished)
            (unfinished / STATE).unlink()
            (unfinished / STATE).write_text(json.dumps({**state, **own}), encoding="utf-8")

    def best_adapter(self) -> Path | None:
        """The best adapter that the newest checkpoint knows."""
        step = self.state().get("best_step")
        return None if step is None else self.adapter_at(step)

    def keep_only(self, step: int, best_step: int) -> None:
        """Remove older checkpoints, all adapters but the best, and what killed processes left half-done."""
        for folder, kept in ((self.checkpoints, step), (self.adapters, best_step)):
            for entry in folder.iterdir():
                if entry.name != f"step-{kept:08d}":
                    shutil.rmtree(entry, ignore_errors=True)

    @property
    def examples(self) -> Path:
        """Folder of the examples of large data, beside this one: the trials of a study share it."""
        return self.path.parent / EXAMPLES

    @property
    def passes(self) -> Path:
        """File, beside this folder, of the passes that have room: the trials of a study share it."""
        return self.path.parent / "passes.json"

    @property
    def scratch(self) -> Path:
        """Folder of whoever runs the trial, for as long as it runs."""
        return self.path / "scratch"

    def moves(self, moving: Moving) -> None:
        """Note what the trial does now. Whoever watches can do without it, so that nothing is raised."""
        with contextlib.suppress(OSError):
            (self.path / MOVING).write_text(json.dumps(asdict(moving)), encoding="utf-8")

    def moving(self) -> Moving | None:
        """What the trial does, as far as is known."""
        try:
            return Moving(**json.loads((self.path / MOVING).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def discard_tensors(self) -> None:
        """Free the disk of a trial that will not go on; its evaluations and its adapter stay."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.path / MOVING).unlink(missing_ok=True)
        for complete in _complete(self.checkpoints):
            (complete / TENSORS).unlink(missing_ok=True)

    def discard_unfinished(self) -> None:
        """Remove what processes that were killed left half-done. Nobody may write to the folder meanwhile."""
        for folder in (self.checkpoints, self.adapters):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if not COMPLETE.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)

    def discard_adapters(self) -> None:
        """Free the disk of the adapters: who is killed meanwhile leaves one that is whole, or none by its name.

        What a worker, which has not heard of its trial's end, is about to write is left to `discard_unfinished`.
        """
        for adapter in _complete(self.adapters):
            with contextlib.suppress(FileNotFoundError):  # another process has the same to do
                adapter.rename(adapter.with_name(adapter.name + GONE))
        for gone in self.adapters.glob(f"*{GONE}"):
            shutil.rmtree(gone, ignore_errors=True)

    def make(self) -> None:
        """Make what `fit` writes into."""
        for folder in (self.checkpoints, self.adapters):
            folder.mkdir(parents=True, exist_ok=True)

    def lock(self, wait_s: float) -> Any:
        """Hold this folder for the block; see `locked`. It is made if missing, and what it lies in is not.

        Raises:
            FileNotFoundError: that is missing. Whoever began the study has made it, so the storage is away, or is not
                shared with this machine; a new folder in its place would hide that.
        """
        self.path.mkdir(exist_ok=True)
        return locked(self.path / "lock", wait_s)


def _parsed(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text())
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise MachineError(f"{file}: is torn; without the folder {file.parent.name} its trial begins anew")
    return state


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if COMPLETE.fullmatch(path.name))
