"""Ray Tune's view of a study: a searcher that hands trials out and a scheduler that takes their reports in.

Both only pass on. What a trial is and how it ends is decided, and remembered, by the study alone; so Tune's own
snapshots of the two are empty, and `Tuner.restore` is never used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.progress_reporter import ProgressReporter
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from bilora_ray.errors import GO_ON, CommonCause, MachineError, UserError
from bilora_ray.interruption import Interrupted, heard
from bilora_ray.paths import kind_of
from bilora_ray.records import Status
from bilora_ray.runners.task import (
    BAD_INPUT,
    BROKEN,
    BY_SETTINGS,
    DIGESTS,
    EVALUATION,
    FAILURE,
    FOLDER,
    NUMBER,
    RESOURCES,
    SETTINGS,
    TRIALS,
)
from bilora_ray.search.session import Observers
from bilora_ray.search.study.storage import naming_the_database
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.settings import SOURCES

# So often a trial whose process died is started again, from its checkpoint, with no evaluation in between.
MAX_FAILURES = 2
# So often a search looks whether it is asked to stop.
ASK_S = 2.0
METRICS = f"{EVALUATION}/"


class Silent(ProgressReporter):
    """Prints nothing of what Tune would."""

    def should_report(self, trials: object, done: bool = False) -> bool:
        """Never."""
        return False

    def report(self, trials: object, done: bool, *sys_info: object) -> None:
        """Nothing."""


class Steered(Stopper):
    """Has Tune stop all when a person asks for it, here or from elsewhere.

    Args:
        study: is asked now and then, whether or not a trial reports.
    """

    def __init__(self, study: SearchStudy) -> None:
        self._study = study
        self._ask_at = 0.0
        self._asked = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether one trial is to stop, which the scheduler says."""
        return False

    def stop_all(self) -> bool:
        """Whether all are to stop; Tune asks several times a second. Interrupted if a signal came: Tune waits 15 s."""
        if (signal := heard()) is not None:
            raise Interrupted(signal)
        if time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + ASK_S
            self._asked = self._asked or self._study.asked_to_stop()
        return self._asked

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the study database is the truth."""
        return {}


class StudySearcher(Searcher):
    """Hands out the study's trials, interrupted ones first.

    Args:
        study: to take trials from.
        observers: are told that a trial starts.
    """

    def __init__(self, study: SearchStudy, observers: Observers) -> None:
        super().__init__()
        self.study = study
        self.observers = observers

    def suggest(self, trial_id: str) -> Any:
        """The task that Tune gives to the function that runs it."""
        with naming_the_database(self.study.layout):
            numbers = self.study.next_trials()
            if not numbers:
                return Searcher.FINISHED
            for number in numbers:
                self.observers.trial_started(self.study.record(number))
            resources = self.study.space.resources.model_dump()
            return {TRIALS: [self._trial(number) for number in numbers], RESOURCES: resources}

    def _trial(self, number: int) -> dict[str, Any]:
        return {
            NUMBER: number,
            FOLDER: str(self.study.folder(number).path),
            SETTINGS: self.study.config(number).model_dump(),
            DIGESTS: self.study.digests(number),
        }

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: the scheduler has told the study already."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as `save`."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study database is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


class StudyScheduler(FIFOScheduler):
    """Gives each report to the study and stops the trials that the study has ended.

    Args:
        study: to report to.
        observers: are told of each evaluation and of each trial's end.

    Attributes:
        halted: why no trial can go on, if that is so.
    """

    def __init__(self, study: SearchStudy, observers: Observers) -> None:
        super().__init__()
        self.study = study
        self.observers = observers
        self.halted: UserError | None = None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Stop or go on."""
        try:
            with naming_the_database(self.study.layout):
                return self._take_in(tune_controller, trial, result)
        except MachineError as error:
            return self._halt(tune_controller, error)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """The trial's process died, or its code raised, and not for a first time that is forgiven."""
        if trial.should_recover():
            return
        try:
            with naming_the_database(self.study.layout):
                for number in self._running(trial):
                    self._fail(tune_controller, number, _cause(trial), by_settings=False)
        except MachineError as error:
            self._halt(tune_controller, error)

    def _take_in(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        number = result[NUMBER]
        if BROKEN not in result and number not in self.study.in_hand():  # it has ended beside others that go on
            return self._verdict(trial)
        if BROKEN in result:
            return self._halt(tune_controller, MachineError(f"trial {number}: {result[BROKEN]}{GO_ON}"))
        if BAD_INPUT in result and self._has_lost_a_source():
            return self._halt(tune_controller, MachineError(f"trial {number}: {result[BAD_INPUT]}{GO_ON}"))
        if BAD_INPUT in result:
            # Another trial's evaluation shows that what all share is right: then it is this one's own settings.
            others_work = any(record.history for record in self.study.records())
            self._fail(tune_controller, number, result[BAD_INPUT], by_settings=others_work)
            if not others_work:
                return self._halt(tune_controller, UserError(result[BAD_INPUT]))
            return self._verdict(trial)
        if FAILURE in result:
            self._fail(tune_controller, number, result[FAILURE], by_settings=result[BY_SETTINGS])
            return self._verdict(trial)
        # Tune flattens what it is given and adds a dozen keys of its own.
        metrics = {key.removeprefix(METRICS): value for key, value in result.items() if key.startswith(METRICS)}
        trial.max_failures = trial.num_failures + MAX_FAILURES
        status = self.study.report(number, metrics)
        record = self.study.record(number)
        self.observers.trial_reported(record, metrics)
        if status is not Status.RUNNING:
            self.observers.trial_ended(record)
        return self._verdict(trial)

    def _has_lost_a_source(self) -> bool:
        """Whether a file or folder that all trials share, and that was there at the start, is away."""
        for key, kind in SOURCES.items():
            name = self.study.space.fixed.get(key)
            if name and kind_of(name, kind != "model") == "local" and not Path(name).exists():
                return True
        return False

    def _verdict(self, trial: Trial) -> str:
        return TrialScheduler.CONTINUE if self._running(trial) else TrialScheduler.STOP

    def _running(self, trial: Trial) -> list[int]:
        """Those of the trials that Tune runs as one that have not ended."""
        running = self.study.in_hand()
        return [one[NUMBER] for one in trial.config[TRIALS] if one[NUMBER] in running]

    def _halt(self, tune_controller: Any, error: UserError) -> str:
        self.halted = self.halted or error
        tune_controller.request_stop_experiment()
        return TrialScheduler.STOP

    def _fail(self, tune_controller: Any, number: int, error: str, by_settings: bool) -> None:
        self.study.fail(number, error, by_settings)
        self.observers.trial_ended(self.study.record(number))
        if (cause := self.study.common_cause()) is not None:
            self._halt(tune_controller, CommonCause(f"{cause}{GO_ON}"))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the study database is the truth."""
        return {}


def _cause(trial: Trial) -> str:
    """The last line of what ended the trial's process. Tune keeps it in a file of its own."""
    file = Path(trial.error_file or "")
    lines = file.read_text(errors="replace").strip().splitlines() if file.is_file() else []
    return lines[-1] if lines else "its process died"
