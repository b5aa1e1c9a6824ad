"""One trial without a search and without Ray: a study of one, trained in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from bilora_ray.errors import GO_ON, MachineError, TrialFailure, UserError, not_again
from bilora_ray.records import IMPORTING, Moving, Status
from bilora_ray.search.session import Observers, Watcher, session
from bilora_ray.search.space import Space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import naming_the_database, running_study
from bilora_ray.search.study.studies import check_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.threads import use_fitting_threads
from bilora_ray.training.folder import ORPHAN_WAIT_S


def train(
    space: Space,
    layout: Layout,
    *,
    resume: bool,
    mlflow_uri: str | None,
    digests: Mapping[str, str],
    watcher: Watcher,
) -> SearchStudy:
    """Train the one trial of a space without distributions, in this process: a study of one.

    Raises:
        UserError: the study or MLflow are not there as said, or the trial met bad input.
        MachineError: a disk or the network failed, and the trial can go on once that is mended.
    """
    from bilora_ray.training.compute.precision import of_machine

    with naming_the_database(layout, then=""):
        check_study(space, layout, resume, digests)
    if space.fixed.get("precision") == "auto":  # of a study that begins: it is decided once
        space = replace(space, fixed={**space.fixed, "precision": of_machine()})
    with (
        naming_the_database(layout),
        running_study(layout, space.study.name),
        session(space, layout, mlflow_uri, digests, watcher) as running,
    ):
        study, observers = running.study, running.observers()
        study.keep_threads(use_fitting_threads)
        numbers = study.next_trials()
        for number in numbers:
            _train(study, number, observers, partial(running.watcher.trial_moves, number))
        if study.full is not None:
            raise study.full
        if not numbers and not study.finished():
            raise MachineError(f"run '{space.study.name}' is being trained by another process")
    return study


def _train(study: SearchStudy, number: int, observers: Observers, tell: Callable[[Moving], None]) -> None:
    def report(metrics: dict[str, float]) -> bool:
        status = study.report(number, metrics)
        observers.trial_reported(study.record(number), metrics)
        if status is Status.RUNNING and study.asked_to_stop():
            raise KeyboardInterrupt
        return status is Status.RUNNING

    observers.trial_started(study.record(number))
    tell(Moving(IMPORTING))
    from bilora_ray.training.distributed.workers import Workers
    from bilora_ray.training.loop import fit

    folder = study.folder(number)
    try:
        with folder.lock(ORPHAN_WAIT_S), not_again():
            # As many rows a step as where the space's workers share them.
            workers = Workers(planned=study.space.resources.workers)
            fit(study.config(number), folder, report, workers, study.digests(number), tell=tell)
    except MachineError as error:
        raise MachineError(f"{error}{GO_ON}") from None
    except (TrialFailure, UserError) as error:
        study.fail(number, str(error), by_settings=isinstance(error, TrialFailure) and error.by_settings)
        if isinstance(error, UserError):
            raise
    finally:
        if study.record(number).status is not Status.RUNNING:
            observers.trial_ended(study.record(number))
