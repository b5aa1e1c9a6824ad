"""A study's trials, read once for all that a moment asks of them.

To propose a trial or to judge one, samplers, schedulers and budgets ask for the trials, each for itself, and Optuna's
storage asks the database each time. In one look they are read once, and what this process writes meanwhile is known. Of
a SQLite file they are read once until another connection writes to it, which SQLite tells
(https://www.sqlite.org/pragma.html#pragma_data_version).
"""

from __future__ import annotations

import copy
import sqlite3
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, TrialState


class _Looking(threading.local):
    """At which study this thread looks; None outside of a look."""

    study_id: int | None = None


class Looks(_CachedStorage):
    """Optuna's storage, which in a block reads the trials of a study once.

    Args:
        backend: the storage of all studies.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._engine = backend.engine
        self._looking = _Looking()
        self._mutex = threading.RLock()
        # What was read, by study: the trials by id, and the study's attributes.
        self._trials: dict[int, dict[int, FrozenTrial]] = {}
        self._attrs: dict[int, dict[str, Any]] = {}
        # The connection that read it, and what it called the state of the file.
        self._version: tuple[object, int] | None = None

    @contextmanager
    def look(self, study_id: int) -> Iterator[None]:
        """One look at a study, for this thread; a look within it is a part of it."""
        if self._looking.study_id is not None:
            yield
            return
        self._looking.study_id = study_id
        self.look_again()
        try:
            yield
        finally:
            self._looking.study_id = None

    def look_again(self) -> None:
        """Read anew, from now on, what another process may have written."""
        with self._mutex:
            version = self._newest_version()
            if version is None or version != self._version:
                self._trials.clear()
                self._attrs.clear()
            self._version = version

    def _newest_version(self) -> tuple[object, int] | None:
        """What changes when another connection has written; None of a database that does not tell."""
        if self._engine.dialect.name != "sqlite":
            return None
        connection = self._engine.raw_connection()
        try:
            (number,) = connection.cursor().execute("PRAGMA data_version").fetchone()
            return connection.driver_connection, number
        except sqlite3.Error as error:
            raise StorageInternalError("PRAGMA data_version") from error
        finally:
            connection.close()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna has it; in a look, as first read."""
        if self._looking.study_id != study_id:
            return super().get_all_trials(study_id, deepcopy, states)
        found = [trial for trial in self._seen(study_id).values() if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna has it; in a look, as first read."""
        study_id = self._looking.study_id
        seen = {} if study_id is None else self._seen(study_id)
        return seen[trial_id] if trial_id in seen else super().get_trial(trial_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """As Optuna has it; in a look, as first read."""
        if self._looking.study_id != study_id:
            return super().get_study_user_attrs(study_id)
        with self._mutex:
            if study_id not in self._attrs:
                self._attrs[study_id] = super().get_study_user_attrs(study_id)
            return self._attrs[study_id]

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        with self._mutex:
            self._attrs.pop(study_id, None)
            super().set_study_user_attr(study_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As Optuna has it."""
        with self._mutex:
            trial_id = super().create_new_trial(study_id, template_trial)
            self._read(trial_id, self._trials.get(study_id))
            return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna has it."""
        with self._mutex:
            changed = super().set_trial_state_values(trial_id, state, values)
            for trials in self._trials.values():
                if trial_id in trials:
                    self._read(trial_id, trials)
            return changed

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """As Optuna has it."""
        with self._mutex:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            self._note(trial_id, "distributions", param_name, distribution)
            self._note(trial_id, "params", param_name, distribution.to_external_repr(param_value_internal))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """As Optuna has it."""
        with self._mutex:
            super().set_trial_intermediate_value(trial_id, step, intermediate_value)
            self._note(trial_id, "intermediate_values", step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        with self._mutex:
            super().set_trial_user_attr(trial_id, key, value)
            self._note(trial_id, "user_attrs", key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        with self._mutex:
            super().set_trial_system_attr(trial_id, key, value)
            self._note(trial_id, "system_attrs", key, value)

    def _seen(self, study_id: int) -> dict[int, FrozenTrial]:
        with self._mutex:
            if study_id not in self._trials:
                trials = super().get_all_trials(study_id, deepcopy=False)
                self._trials[study_id] = {trial._trial_id: trial for trial in trials}
            return self._trials[study_id]

    def _read(self, trial_id: int, trials: dict[int, FrozenTrial] | None) -> None:
        """Read one of the `trials` that are known anew; none are known outside of a look."""
        if trials is not None:
            trials[trial_id] = super().get_trial(trial_id)

    def _note(self, trial_id: int, what: str, key: Any, value: Any) -> None:
        """Know what was written, of a copy: who holds the trial holds it as it was."""
        for trials in self._trials.values():
            if trial_id in trials:
                trial = copy.copy(trials[trial_id])
                setattr(trial, what, {**getattr(trial, what), key: value})
                trials[trial_id] = trial


@contextmanager
def one_look(study: optuna.Study) -> Iterator[None]:
    """In the block, the trials of `study` are read once, if its storage knows how."""
    if not isinstance(study._storage, Looks):
        yield
        return
    with study._storage.look(study._study_id):
        yield


def look_again(study: optuna.Study) -> None:
    """Read the trials of `study` anew, where others may have written."""
    if isinstance(study._storage, Looks):
        study._storage.look_again()


def attributes_of(study: optuna.Study) -> Mapping[str, Any]:
    """What `study.user_attrs` has, to read: that copies all of it each time, the whole space among it."""
    found: Mapping[str, Any] = study._storage.get_study_user_attrs(study._study_id)
    return found
