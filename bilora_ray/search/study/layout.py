"""Where a storage path keeps things. Nothing here imports Optuna, so that the command line stays light."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bilora_ray.addresses import masked
from bilora_ray.errors import UserError
from bilora_ray.files import is_held, locked
from bilora_ray.training.folder import TrialFolder

# Two processes may want the same for a moment: each waits for the other instead of failing.
WAIT_S = 60.0
# The study database and MLflow get the path in a URL, and MLflow takes these for more than themselves.
NOT_IN_A_PATH = "%?{}"


@dataclass(frozen=True)
class Layout:
    """Where a storage path keeps things.

    Attributes:
        storage_path: an absolute path.
        study_database: URL of a PostgreSQL database with the studies; None: a SQLite file in the storage path. In
            PostgreSQL several processes, on several machines, may run one study.

    Raises:
        UserError: the path has a character that cannot be.
    """

    storage_path: Path
    study_database: str | None = None

    def __post_init__(self) -> None:
        if wrong := [character for character in NOT_IN_A_PATH if character in str(self.storage_path)]:
            raise UserError(f"--storage-path {self.storage_path}: may not hold {wrong[0]}; MLflow could not use it")

    @property
    def database_file(self) -> Path:
        """The SQLite file of the Optuna storage that all studies of the storage path share."""
        return self.storage_path / "studies.db"

    @property
    def database(self) -> str:
        """Where the studies are, as a person is told: the server, without its password, or the storage path."""
        return str(self.storage_path) if self.study_database is None else masked(self.study_database)

    def study(self, name: str) -> Path:
        """Folder of one study."""
        return self.storage_path / "studies" / name

    def trials(self, name: str) -> Path:
        """Folder of a study's trials."""
        return self.study(name) / "trials"

    def trial(self, name: str, number: int) -> TrialFolder:
        """Folder of one trial: its checkpoints and its best adapter."""
        return TrialFolder(self.trials(name) / f"{number:04d}")

    def examples(self, name: str) -> Path:
        """File of some validation rows of study `name`, as its winner and the base model answer them."""
        return self.study(name) / "examples.json"

    def report(self, name: str) -> Path:
        """The page of study `name`, as its last search left it."""
        return self.study(name) / "report.html"

    def lent(self, name: str) -> Path:
        """Folder of the checkpoints from which trials of a study may yet go on that are others'."""
        return self.study(name) / "lent"

    def make(self, name: str) -> None:
        """Make the folders of study `name`. Only who begins the study does, or goes on with it.

        Amid a search they are missing only if the storage is away, and new ones in their place would hide that.
        """
        self.trials(name).mkdir(parents=True, exist_ok=True)

    def choosing(self, name: str) -> AbstractContextManager[None]:
        """For the block, no other process begins study `name` or takes a trial of it."""
        return locked(self._choosing(name), WAIT_S)

    def await_choice(self, name: str) -> None:
        """Wait, without a lock, until who is `choosing` a trial of study `name` has it."""
        deadline = time.monotonic() + WAIT_S
        while is_held(self._choosing(name)) and time.monotonic() < deadline:
            time.sleep(0.05)

    def claim(self, name: str, number: int) -> Path:
        """The lock file that whoever runs a trial holds."""
        return self.trial(name, number).path / "claim.lock"

    def searching(self, name: str) -> Path:
        """The lock file that whoever runs study `name` holds, where only one process may."""
        return self.study(name) / "search.lock"

    def _choosing(self, name: str) -> Path:
        return self.study(name) / "choosing.lock"
