"""Ray Tune's view of a study: a searcher that hands trials out and a scheduler that takes their reports in.

Both only pass on. What a trial is and how it ends is decided, and remembered, by the study alone; so Tune's own
snapshots of the two are empty, and `Tuner.restore` is never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from bilora_ray.scale.trial import BAD_INPUT, EVALUATION, FAILURE
from bilora_ray.search.session import Observers
from bilora_ray.search.study import SearchStudy
from bilora_ray.tracking.records import Status

NUMBER, FOLDER, SETTINGS = "number", "folder", "settings"
METRICS = f"{EVALUATION}/"


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
        """What Tune gives to `run_trial`."""
        number = self.study.next_trial()
        if number is None:
            return Searcher.FINISHED
        self.observers.trial_started(self.study.record(number))
        return {
            NUMBER: number,
            FOLDER: str(self.study.folder(number).path),
            SETTINGS: self.study.config(number).model_dump(),
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
        bad_input: the line of a user's error that a trial met; no trial can go well then, so all are stopped.
    """

    def __init__(self, study: SearchStudy, observers: Observers) -> None:
        super().__init__()
        self.study = study
        self.observers = observers
        self.bad_input: str | None = None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Stop or go on."""
        number = trial.config[NUMBER]
        if BAD_INPUT in result:
            self.bad_input = result[BAD_INPUT]
            self._fail(number, result[BAD_INPUT])
            tune_controller.request_stop_experiment()
            return TrialScheduler.STOP
        if FAILURE in result:
            self._fail(number, result[FAILURE])
            return TrialScheduler.STOP
        # Tune flattens what it is given and adds a dozen keys of its own.
        metrics = {key.removeprefix(METRICS): value for key, value in result.items() if key.startswith(METRICS)}
        status = self.study.report(number, metrics)
        record = self.study.record(number)
        self.observers.trial_reported(record, metrics)
        if status is Status.RUNNING:
            return TrialScheduler.CONTINUE
        self.observers.trial_ended(record)
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """The trial's process died, or its code raised, and not for a first time that is forgiven."""
        if trial.should_recover():
            return
        error = trial.get_error()
        lines = str(error).strip().splitlines() if error else []
        self._fail(trial.config[NUMBER], lines[-1] if lines else "its process died")

    def _fail(self, number: int, error: str) -> None:
        self.study.fail(number, error)
        self.observers.trial_ended(self.study.record(number))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the study database is the truth."""
        return {}
