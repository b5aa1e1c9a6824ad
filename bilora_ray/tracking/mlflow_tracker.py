"""A study's tracking in MLflow, which the search may forget about: it neither raises nor hangs.

MLflow follows the study's records. What cannot be sent is kept and sent with the next call that gets through, or when
the study is closed, or when it is resumed.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bilora_ray.addresses import masked
from bilora_ray.errors import UserError
from bilora_ray.records import Served, Status, TrialRecord
from bilora_ray.tracking.guard import Guard, reason
from bilora_ray.tracking.pages import TRAINING, view_address
from bilora_ray.tracking.store import SERVERS, check_runs, connect, make_store, newest_view
from bilora_ray.tracking.study_runs import StudyInfo, StudyRuns, add_result

LATER = "the search goes on, and what is missed is sent later"
AT_RESUME = "`bilora-ray tune --resume` sends what is missing"


def default_uri(storage_path: Path) -> str:
    """The SQLite file that is MLflow's store where a user names none."""
    return f"sqlite:///{storage_path.absolute() / 'mlflow.db'}"


class _Reconciling(ABC):
    """An observer to whom each event of a trial is a newer record of it."""

    @abstractmethod
    def reconcile(self, trials: Iterable[TrialRecord]) -> None:
        """Make MLflow agree with `trials`."""

    def trial_started(self, trial: TrialRecord) -> None:
        """A trial begins, or goes on after an interruption."""
        self.reconcile([trial])

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self.reconcile([replace(trial, history=(*trial.history, metrics))])

    def trial_ended(self, trial: TrialRecord) -> None:
        """A trial is complete, pruned or failed."""
        self.reconcile([trial])


class MlflowTracker(_Reconciling):
    """Observes a search and keeps MLflow's runs in agreement with it. Made by `open`; threads may share it.

    Args:
        connect_runs: finds the study's runs, or makes them; called again after every failure.
        say: shows one line to a person.
    """

    def __init__(self, connect_runs: Callable[[], StudyRuns], say: Callable[[str], None]) -> None:
        self._connect_runs = connect_runs
        self._guard = Guard(say)
        # One thread sends at a time; while it does, others may add to what is to be sent.
        self._sending, self._keeping = threading.Lock(), threading.Lock()
        self._pending: dict[int, TrialRecord] = {}
        self._running: set[int] = set()
        self._runs: StudyRuns | None = connect_runs()

    @classmethod
    def open(
        cls, uri: str, project: str, artifact_root: Path, study: StudyInfo, say: Callable[[str], None]
    ) -> MlflowTracker:
        """Connect to MLflow and begin the study's run there, or go on with it.

        Args:
            uri: MLflow tracking URI; a SQLite file and its tables are made if missing.
            project: MLflow experiment, made if missing.
            artifact_root: folder of the artifacts where the store is a SQLite file; a server has its own place.
            study: what MLflow is told of it.
            say: shows one line to a person.

        Raises:
            UserError: the URI is none that will do, or nothing that can be written answers there.
        """

        def connect_runs() -> StudyRuns:
            return StudyRuns(*connect(uri, project, artifact_root), study)

        try:
            make_store(uri, artifact_root)
            tracker = cls(connect_runs, say)
        except UserError:
            raise
        except Exception as error:  # its type depends on the store: MLflow's, SQLAlchemy's or a missing driver's
            raise UserError(f"--mlflow-uri {masked(uri)}: MLflow does not answer ({reason(error)})") from None
        return tracker

    def reconcile(self, trials: Iterable[TrialRecord]) -> None:
        """Make MLflow agree with `trials`, as when a study is resumed."""
        self.keep(trials)
        self.send()

    def close(
        self,
        trials: Sequence[TrialRecord],
        best_number: int | None,
        interrupted: bool,
        others: bool = False,
        front: Sequence[int] = (),
        told: Sequence[str] = (),
        served: Served | None = None,
    ) -> None:
        """Make MLflow agree with `trials` and end the study's run. Trials that still run are marked as interrupted.

        Args:
            trials: all of the study's but those that other processes run.
            best_number: the best trial's; None if none is complete, or none is to be taken.
            interrupted: whether the study is to go on later.
            others: whether other processes go on with the study now: its run stays as it is.
            front: the numbers of the trials on the Pareto front; none where there is one objective.
            told: what else the page of the study's run is to say, a line each, in Markdown.
            served: what MLflow is told of the best trial's adapter, which becomes a model; None: it does not.
        """
        self.keep(trials)
        with self._sending, self._guard.attempt(AT_RESUME):
            self._runs = None  # other processes may have made and ended runs since
            self._flush(lambda runs: runs.end(trials, best_number, interrupted, others, front, told, served))

    def interrupt(self) -> None:
        """End the runs that were begun here, and the study's, as interrupted: the study cannot be asked any more."""
        with self._sending, self._guard.attempt(AT_RESUME):
            self._flush(lambda runs: runs.interrupt(self._running))

    def keep(self, trials: Iterable[TrialRecord]) -> None:
        """Let the newest record of each trial wait, with the evaluations of those that it takes the place of."""
        with self._keeping:
            for trial in trials:
                waiting = self._pending.get(trial.number, trial)
                by_step = {metrics["step"]: metrics for metrics in (*waiting.history, *trial.history)}
                self._pending[trial.number] = replace(trial, history=tuple(by_step.values()))
                if trial.status is Status.RUNNING:
                    self._running.add(trial.number)
                else:
                    self._running.discard(trial.number)

    def send(self) -> None:
        """Send what waits, unless MLflow has just failed to answer."""
        with self._sending:
            if self._guard.ready():
                with self._guard.attempt(LATER):
                    self._flush()

    def _flush(self, then: Callable[[StudyRuns], None] = lambda runs: None) -> None:
        # What is left half-done, by an error or by Ctrl-C, is not trusted: MLflow is asked again what it holds.
        runs, self._runs = self._runs or self._connect_runs(), None
        while (trial := self._next()) is not None:
            runs.sync(trial)
            with self._keeping:
                if self._pending[trial.number] is trial:  # else there is more of it by now
                    del self._pending[trial.number]
        then(runs)
        self._runs = runs

    def _next(self) -> TrialRecord | None:
        """Of what waits, the first; it goes to the end, since one that cannot be sent must not hold up the others."""
        with self._keeping:
            if not self._pending:
                return None
            number = next(iter(self._pending))
            trial = self._pending[number] = self._pending.pop(number)
            return trial


class BackgroundTracker(_Reconciling):
    """Observes a search for a tracker, which sends in a thread: a slow server holds up no trial.

    The thread lives as long as there is something to send. It does not keep the process from ending: what is lost then
    is sent by a resume.

    Args:
        tracker: nothing else need use it meanwhile, but may.
    """

    def __init__(self, tracker: MlflowTracker) -> None:
        self._tracker = tracker
        self._lock = threading.Lock()
        self._busy = self._again = False

    def reconcile(self, trials: Iterable[TrialRecord]) -> None:
        """Have MLflow agree with `trials`, soon."""
        self._tracker.keep(trials)
        with self._lock:
            self._again = self._busy
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._send, name="mlflow", daemon=True).start()

    def _send(self) -> None:
        while True:
            self._tracker.send()
            with self._lock:
                if not self._again:
                    self._busy = False
                    return
                self._again = False


def add_to_study(
    uri: str,
    project: str,
    artifact_root: Path,
    study: StudyInfo,
    metrics: Mapping[str, float],
    winner: str | None,
    say: Callable[[str], None],
    files: Sequence[Path] = (),
) -> None:
    """Add to the run of a study that has ended what came of it later. What is there is not added again.

    Args:
        uri: as `MlflowTracker.open` takes it, with what follows.
        project: the same.
        artifact_root: the same.
        study: the same.
        metrics: by name; those with a `step` among them are of that step.
        winner: what its finalists say, one line; None: nothing new.
        say: shows one line to a person: that MLflow does not answer.
        files: that are kept beside its report.
    """
    with Guard(say).attempt(AT_RESUME):
        client, experiment_id = connect(uri, project, artifact_root)
        add_result(client, experiment_id, study, metrics, winner, files)


def ui_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that shows the store at `uri` in a browser on this machine, and its additions to the environment.

    Args:
        uri: MLflow tracking URI of a database.
        port: on 127.0.0.1.

    Raises:
        UserError: `uri` is a server, which has pages of its own, or a file without runs.
    """
    if uri.partition("://")[0] in SERVERS:
        raise UserError(f"--mlflow-uri {masked(uri)}: a server with pages of its own; open it in a browser")
    check_runs(uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--registry-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level=warning"]
    # The job runner is not needed to look at runs, and would be most of the time until the first page.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # Else Python would take a file of the current folder for a package of its name.
    environment["PYTHONSAFEPATH"] = "1"
    return command, {**environment, "PYTHONWARNINGS": "ignore"}


def ui_address(uri: str, port: int) -> str:
    """Where to look first in the pages that `ui_command` serves: at the trials of the newest study, if it is known.

    Args:
        uri: MLflow tracking URI of a database.
        port: on 127.0.0.1.
    """
    newest = newest_view(uri)
    page = f"#/experiments?{TRAINING}" if newest is None else view_address(*newest)
    return f"http://127.0.0.1:{port}/{page}"
