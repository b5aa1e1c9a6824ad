"""Where a storage path keeps things, and the one database of its studies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from sqlalchemy.exc import DatabaseError

from bilora_ray.errors import UserError
from bilora_ray.training.folder import TrialFolder, locked

# Two processes may make or write the database at one time: each waits for the other instead of failing.
WAIT_S = 60.0


@dataclass(frozen=True)
class Layout:
    """Where a storage path keeps things."""

    storage_path: Path

    @property
    def database_file(self) -> Path:
        """The SQLite file of the Optuna storage that all studies of the storage path share."""
        return self.storage_path / "studies.db"

    def study(self, name: str) -> Path:
        """Folder of one study."""
        return self.storage_path / "studies" / name

    def trials(self, name: str) -> Path:
        """Folder of a study's trials."""
        return self.study(name) / "trials"

    def trial(self, name: str, number: int) -> TrialFolder:
        """Folder of one trial: its checkpoints and its best adapter."""
        return TrialFolder(self.trials(name) / f"{number:04d}")


def open_storage(layout: Layout) -> optuna.storages.RDBStorage:
    """The storage of all studies under a storage path, made if missing. UserError if its file is something else."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{layout.database_file}"
    try:
        with locked(layout.storage_path / "studies.db.lock", WAIT_S):
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": WAIT_S}})
    except (DatabaseError, RuntimeError):
        raise UserError(f"{layout.database_file}: is not a database of studies that this version can read") from None


def study_names(layout: Layout) -> list[str]:
    """The studies in a storage path."""
    if not layout.database_file.exists():
        return []
    return optuna.get_all_study_names(open_storage(layout))


@contextmanager
def locked_study(layout: Layout, name: str) -> Iterator[None]:
    """Be the one process that runs study `name`. UserError if another one does, or the folder cannot be written."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(layout.study(name) / "search.lock", wait_s=0))
        except TimeoutError:
            raise UserError(f"study '{name}' is being searched by another process") from None
        except OSError as error:
            raise UserError(f"--storage-path {layout.storage_path}: cannot be written ({error.strerror})") from None
        yield
