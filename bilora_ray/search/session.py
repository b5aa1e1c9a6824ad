"""What surrounds the trials of a study, with a cluster or without: its tracking, its watchers, its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any, Protocol

from bilora_ray.addresses import masked
from bilora_ray.digests import of_data
from bilora_ray.errors import GO_ON, MachineError, UserError, first_line
from bilora_ray.files import locked
from bilora_ray.records import Moving, Objective, Observer, Served, Status, TrialRecord
from bilora_ray.search.readiness.machine import in_words as machine
from bilora_ray.search.space import FINALISTS_OF, Space, setting_of
from bilora_ray.search.study.control.finalists import winner_of
from bilora_ray.search.study.control.verdict import Verdict
from bilora_ray.search.study.layout import WAIT_S, Layout
from bilora_ray.search.study.storage import is_database, naming_the_database, study_names
from bilora_ray.search.study.studies import delete_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import StudyView, compared_in, comparison_of, search_of
from bilora_ray.search.study.warm_start import in_words
from bilora_ray.tracking.mlflow_tracker import BackgroundTracker, MlflowTracker, add_to_study, default_uri
from bilora_ray.tracking.models import Candidate, candidate
from bilora_ray.tracking.pages import baseline_line
from bilora_ray.tracking.provenance import versions
from bilora_ray.tracking.study_runs import StudyInfo

logger = logging.getLogger(__name__)
# So long nobody wonders why a search that is over does not end.
LATE_S = 3.0
# How often it is looked what trials do, and how long at the least that is for each of very many.
LOOK_S, LOOK_EACH_S = 2.0, 0.02
STUDY_ID = "bilora_ray.study_id"


class Watcher(Observer, Protocol):
    """Shows a search to a person, inside a `with` block."""

    def __enter__(self) -> object:
        """Begin to show."""

    def __exit__(self, *_: object) -> None:
        """End."""

    def start(self, records: list[TrialRecord]) -> None:
        """Take in the trials that the study holds already."""

    def say(self, line: str) -> None:
        """Show one line, such as that MLflow does not answer."""

    def trial_moves(self, number: int, moving: Moving) -> None:
        """Show what a trial does between its evaluations; from any thread, often."""


class Watch(Protocol):
    """Makes who shows a study to a person."""

    def __call__(
        self,
        num_trials: int,
        objective: Objective,
        notes: Sequence[str] = (),
        labels: Sequence[str] = (),
        has_best: bool = True,
    ) -> Watcher:
        """Of how many trials, what they are judged by, lines to show as the first one starts, whether one is best."""


class Observers:
    """Tells each observer, and keeps the search from what one raises.

    Args:
        observers: who is told.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = list(observers)

    def trial_started(self, trial: TrialRecord) -> None:
        """A trial begins, or goes on."""
        self._tell(lambda observer: observer.trial_started(trial))

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self._tell(lambda observer: observer.trial_reported(trial, metrics))

    def trial_ended(self, trial: TrialRecord) -> None:
        """A trial has ended."""
        self._tell(lambda observer: observer.trial_ended(trial))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in tuple(self.observers):
            try:
                call(observer)
            except Exception:  # whatever a watcher does wrong, Tune would end the whole search for it
                logger.exception("an observer failed and is told no more")
                self.observers.remove(observer)


@dataclass(frozen=True)
class Session:
    """A study that is being run.

    Attributes:
        study: the study.
        watcher: who shows it to a person.
        tracking: gives the tracker, once MLflow has answered.
    """

    study: SearchStudy
    watcher: Watcher
    tracking: Future[MlflowTracker]

    def observers(self) -> Observers:
        """Who observes the trials. Waits for MLflow, which learns what it missed; UserError if it cannot be used."""
        tracker = BackgroundTracker(self.tracking.result())
        tracker.reconcile(self.study.own_records())
        return Observers([tracker, self.watcher])

    def close(self) -> None:
        """End the study's run in MLflow, unless MLflow could not be opened, and give up this process's trials."""
        try:
            self.study.settle()
            write_page(self.study, self.watcher.say, ended=self.study.in_hand())
            if self.tracking.exception() is None:
                late = Timer(LATE_S, self.watcher.say, ["MLflow is sent what is left"])
                late.start()
                try:
                    self._close(self.tracking.result())
                finally:
                    late.cancel()
        finally:
            self.study.release()

    def _close(self, tracker: MlflowTracker) -> None:
        try:
            best, records = self.study.best(), self.study.own_records()
            interrupted, others = not self.study.finished(), bool(self.study.elsewhere())
            if not interrupted:
                self.study.discard_examples()
        except BaseException:  # the study database is gone: MLflow is told what is known without it
            tracker.interrupt()
            raise
        front = [record.number for record in self.study.front(records)]
        if search_of(self.study.study) is not None:  # its luckiest run is nothing that anybody should take
            best = winner_of(self.study)
        number = None if best is None else best.number
        served = None if interrupted or others else served_of(self.study, best)
        tracker.close(records, number, interrupted, others, front, told_of(self.study), served)


def served_of(study: StudyView, best: TrialRecord | None) -> Served | None:
    """What MLflow is told of the adapter of the `best` trial, so that it can load it; None if there is none to take.

    Where finalists are trained it is the winner's that is taken, and not that of a search's best single run.
    """
    from bilora_ray.release.served import served

    if best is None or best.adapter is None or not best.adapter.is_dir() or study.space.study.finalists:
        return None
    try:
        return served(best.adapter, study.origin(best))
    except UserError as error:
        logger.debug("no model is made of %s: %s", best.adapter, error)
        return None


def candidate_of(study: StudyView, record: TrialRecord) -> Candidate:
    """The adapter of a trial as MLflow takes it for a model. UserError if there is none."""
    from bilora_ray.release.served import served

    name = study.space.study.name
    if record.adapter is None or not record.adapter.is_dir():
        raise UserError(f"study '{name}': trial {record.number} has no adapter; `bilora-ray show {name}` says why")
    return candidate(name, record, served(record.adapter, study.origin(record)))


def told_of(study: StudyView) -> list[str]:
    """What there is to say of a study beside its trials, a line each, in Markdown."""
    search, told = search_of(study.study), []
    if search is not None:
        told.append(f"These are the finalists of study '{search}', trained anew on fresh seeds")
    if (comparison := comparison_of(study.study)) is not None:
        if compared_in(study.study) is not None:
            told.append(f"These are the runs of comparison '{comparison}': its outcome is among metrics and artifacts")
        else:
            told.append(f"A part of comparison '{comparison}', whose outcome is in the run of its runs")
    line = baseline_line(study.baseline_of_best() or {}, study.objective.metric)
    if line is not None:
        told.append(line)
    if study.space.study.finalists:
        finals = FINALISTS_OF.format(study.space.study.name)
        told.append(f"Its best are trained anew on fresh seeds in study '{finals}'")
    return told


@contextmanager
def session(
    space: Space,
    layout: Layout,
    mlflow_uri: str | None,
    digests: Mapping[str, str],
    watcher: Watcher,
    kept: Mapping[str, Any] | None = None,
) -> Iterator[Session]:
    """The study of `space`, tracked and watched, for the block that runs its trials.

    MLflow is opened beside the block, since both it and a cluster take seconds to start. If the block raises UserError
    in a study that began here, and no trial is complete, the study is removed again: bad input leaves nothing behind.
    """
    if mlflow_uri and layout.study_database and is_database(mlflow_uri, layout.study_database):
        raise UserError(f"--mlflow-uri {masked(mlflow_uri)}: holds the studies; MLflow needs a database of its own")
    begins = space.study.name not in study_names(layout)
    with naming_the_database(layout, then="" if begins else GO_ON):
        study = open_study(space, layout, digests, kept)
        study.keep_made_with({**versions(), **machine()})
    with ThreadPoolExecutor(max_workers=1) as executor:
        running = Session(study, watcher, executor.submit(_tracker, study, mlflow_uri, digests, watcher))
        try:
            with closing(running), watcher:
                watcher.start(study.records())
                if begins and study.warm_start:
                    watcher.say(in_words(study.warm_start))
                yield running
        except UserError as error:
            # Of a database that others use, nobody can tell who else is about to run the study.
            ours = begins and layout.study_database is None
            if (
                ours
                and not any(one.status is Status.COMPLETE for one in study.records())
                and not isinstance(error, MachineError)
            ):
                delete_study(space, layout)
            raise


def write_page(study: StudyView, say: Callable[[str], None], ended: Collection[int] = ()) -> None:
    """Write the page of a study into its folder. Whatever is wrong with that, no search is lost for it.

    Args:
        study: the study.
        say: is told why there is no page.
        ended: its trials that are running in the database, and that this process runs no more.
    """
    name = study.space.study.name
    try:
        from bilora_ray.report.page import write_report

        write_report([study], study.layout.report(name), ended)
    except Exception as error:  # of a chart library or a disk: no search is lost for a page
        logger.debug("the page of a study was not written", exc_info=True)
        say(f"Note: there is no page of the study ({first_line(error)}); `bilora-ray report {name}` tries again")


@contextmanager
def watching_moves(study: SearchStudy, watcher: Watcher) -> Iterator[None]:
    """In the block `watcher` hears what the running trials of this process do between their evaluations."""
    done = Event()

    def look() -> None:
        seen: dict[int, Moving] = {}
        wait = LOOK_S
        while not done.wait(wait):
            numbers = study.in_hand()
            wait = max(LOOK_S, len(numbers) * LOOK_EACH_S)
            for number in numbers:
                now = study.folder(number).moving()
                if now is not None and now != seen.get(number):
                    seen[number] = now
                    watcher.trial_moves(number, now)

    looking = Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join(LATE_S)  # a storage that is away may hold it


def tell_result(
    study: StudyView,
    mlflow_uri: str | None,
    metrics: Mapping[str, float],
    say: Callable[[str], None],
    winner: str | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Add to the run of a study that has ended what came of it: metrics, what its finalists say, its report.

    Args:
        study: the study.
        mlflow_uri: MLflow server or database; None: a SQLite file beside the studies.
        metrics: by name; those with a `step` among them are of that step.
        winner: what its finalists say, one line; None: nothing new.
        say: shows one line to a person: that MLflow does not answer.
        files: that are kept beside its report.
    """
    layout, project = study.layout, study.space.study.project
    uri = mlflow_uri or default_uri(layout.storage_path)
    add_to_study(uri, project, artifacts_of(layout), study_info(study, {}), metrics, winner, say, files)


def winner_in_words(verdict: Verdict, metric: str, adapter: Path | None) -> str:
    """Who wins among the finalists, with which score, and which adapter is taken; in Markdown that begins in bold."""
    score = f"{metric} {verdict.score:.4g}"
    if verdict.low is not None and verdict.high is not None:
        score += f" (95 %: {verdict.low:.4g} to {verdict.high:.4g})"
    line = f"of the finalists: trial {verdict.winner.trial}, {score} on {verdict.seeds} fresh seeds**"
    return line if adapter is None else f"{line}. Its adapter: `{adapter}`"


def artifacts_of(layout: Layout) -> Path:
    """Where a SQLite store of MLflow keeps its artifacts; a server has its own place."""
    return layout.storage_path / "mlflow-artifacts"


def study_info(study: StudyView, digests: Mapping[str, str]) -> StudyInfo:
    """What MLflow is told of `study`, whose data and base models have `digests` by source."""
    space, layout = study.space, study.layout
    return StudyInfo(
        name=space.study.name,
        tags={STUDY_ID: study.id},
        params=space.fixed,
        digests=of_data(digests),
        objectives=study.objectives,
        searched=tuple(dict.fromkeys(map(setting_of, space.distributions))),
        storage_path=layout.storage_path,
        report=layout.report(space.study.name),
        search=search_of(study.study),
    )


def _tracker(study: SearchStudy, mlflow_uri: str | None, digests: Mapping[str, str], watcher: Watcher) -> MlflowTracker:
    space, layout = study.space, study.layout
    # One process at a time, or two that begin together would each make the study's run.
    with locked(layout.study(space.study.name) / "tracking.lock", WAIT_S):
        uri, project = mlflow_uri or default_uri(layout.storage_path), space.study.project
        return MlflowTracker.open(uri, project, artifacts_of(layout), study_info(study, digests), watcher.say)
