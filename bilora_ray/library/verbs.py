"""`tune`, `compare`, `train` and `load_study`: what the command line does, for a notebook or a program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.errors import UserError
from bilora_ray.library.arguments import checked
from bilora_ray.library.asked import Asked
from bilora_ray.library.comparing import ComparisonLike, check_comparison, comparison_of, run_comparison
from bilora_ray.library.exporting import check_new
from bilora_ray.library.searching import check_search, is_counted, run_search, space_of
from bilora_ray.library.spaces import SpaceLike, as_overrides, of_settings
from bilora_ray.library.study import Study
from bilora_ray.library.surroundings import left_as_found
from bilora_ray.library.training import check_run, run_one
from bilora_ray.paths import absolute
from bilora_ray.search.study.layout import Layout

if TYPE_CHECKING:
    from bilora_ray.evidence.outcome import Outcome
    from bilora_ray.records import Moving, TrialRecord
    from bilora_ray.search.session import Watch


@checked
def tune(
    space: SpaceLike,
    *,
    settings: Mapping[str, Any] | None = None,
    num_trials: int | None = None,
    max_concurrent: int | None = None,
    resume: bool = False,
    extend: int | None = None,
    warm_start: Sequence[str] = (),
    storage_path: str | Path | None = None,
    study_database: str | None = None,
    mlflow_uri: str | None = None,
    ray_address: str | None = None,
    insecure: bool = False,
    progress: bool = True,
) -> Study:
    """Search a space for the best adapter, as `bilora-ray tune` does. Returns once every trial has ended.

    A search that is interrupted, by Ctrl-C, by a notebook's stop button or worse, goes on with `resume=True`. Where an
    error names an option such as --resume, that is the argument of its name.

    Args:
        space: a space file (YAML), the name of one that ships with the package, such as `quickstart`, or a dict of the
            same shape. Relative paths in a file start at its folder, in a dict at the current one.
        settings: what overrides the space, as `--set` does: `{"rho": 0.1, "study.seed": 1}`. A value may be a
            distribution.
        num_trials: trials to finish; None: the space's.
        max_concurrent: trials at one time; None: what there is room for.
        resume: go on with a study after an interruption, or with more trials.
        extend: go on with a study, with so many trials more than it was asked for.
        warm_start: names of earlier studies, or one name, to begin with what was best in them.
        storage_path: where studies, checkpoints and adapters are kept; None: `BILORA_RAY_STORAGE_PATH`, or `runs`.
        study_database: URL of a PostgreSQL database of the studies; None: `BILORA_RAY_STUDY_DATABASE`, or a SQLite file
            in the storage path.
        mlflow_uri: MLflow server or database; None: `MLFLOW_TRACKING_URI`, or a SQLite file in the storage path.
        ray_address: of a Ray cluster; None: `RAY_ADDRESS`, or one on this machine for the time of the search.
        insecure: use another machine's Ray cluster or MLflow server without a token or password.
        progress: show how the search stands, in a notebook or on stderr.

    Raises:
        UserError: one line that says what is wrong, where, and what is allowed; a MachineError can be mended, and the
            search goes on with `resume=True`.
        KeyboardInterrupt: once the trials are stopped.
    """
    asked = Asked(
        layout=_layout(storage_path, study_database),
        resume=resume,
        extend=extend,
        ray_address=ray_address or os.environ.get("RAY_ADDRESS"),
        mlflow_uri=mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI"),
        insecure=insecure,
        num_trials=num_trials,
        max_concurrent=max_concurrent,
        warm_start=[warm_start] if isinstance(warm_start, str) else warm_start,
    )
    overrides = as_overrides(settings or {})
    found = space_of(space, overrides, asked)  # a mistake in it is told before anything heavy is imported
    with _in_this_process():
        search = check_search(found, asked, is_counted(overrides, asked))
        run_search(search, _watch(progress))
    return Study(search.space.study.name, asked.layout)


@checked
def compare(
    file: ComparisonLike,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    extend: int | None = None,
    storage_path: str | Path | None = None,
    study_database: str | None = None,
    mlflow_uri: str | None = None,
    ray_address: str | None = None,
    insecure: bool = False,
    progress: bool = True,
) -> Outcome:
    """Compare methods at equal budgets, as `bilora-ray compare` does. Returns once each run is scored.

    Args:
        file: a comparison file (YAML), the name of one that ships with the package, such as `quickstart`, or a dict of
            the same shape.
        settings: what overrides it, as `--set` does: `{"max_steps": 100, "comparison.seeds": 5}`.
        resume: go on with a comparison after an interruption, or tell of it again.
        extend: go on with it, on so many seeds more than it has.
        storage_path: as `tune` takes it, with what follows.
        study_database: the same.
        mlflow_uri: the same.
        ray_address: the same.
        insecure: the same.
        progress: the same.

    Returns:
        What was tuned and run, and how each entry differs from the baseline.

    Raises:
        UserError: as `tune`.
        KeyboardInterrupt: what is done is kept.
    """
    asked = Asked(
        layout=_layout(storage_path, study_database),
        resume=resume,
        extend=extend,
        ray_address=ray_address or os.environ.get("RAY_ADDRESS"),
        mlflow_uri=mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI"),
        insecure=insecure,
    )
    found = comparison_of(file, as_overrides(settings or {}), asked)
    with _in_this_process():
        checks = check_comparison(found, asked)
        return run_comparison(checks, _watch(progress), _say(progress))


@checked
def train(
    space: SpaceLike | None = None,
    output: str | Path | None = None,
    *,
    study: str | None = None,
    trial: int | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str = "train",
    resume: bool = False,
    storage_path: str | Path | None = None,
    study_database: str | None = None,
    mlflow_uri: str | None = None,
    insecure: bool = False,
    progress: bool = True,
) -> Study:
    """Train one adapter in this process, without a search and without Ray, as `bilora-ray train` does.

    Args:
        space: a space file, a dict of the same shape, or a dict of a trial's settings; None: those of a trial of
            `study`, or `settings` alone.
        output: a new folder for the adapter; None: `export` of what is returned takes it.
        study: take the settings of a trial of this study.
        trial: the trial's number; None: the best.
        settings: what overrides all that, as `--set` does.
        name: of the run, which is kept as a study of one.
        resume: go on with the run after an interruption.
        storage_path: as `tune` takes it, with what follows.
        study_database: the same.
        mlflow_uri: the same.
        insecure: the same.
        progress: the same.

    Returns:
        The study of one, whose `best` is the run.

    Raises:
        UserError: as `tune`; or the training failed, of its settings.
        KeyboardInterrupt: what is done is kept.
    """
    layout = _layout(storage_path, study_database)
    mlflow_uri = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    asked = Asked(layout=layout, resume=resume, mlflow_uri=mlflow_uri, insecure=insecure)
    if output is not None:
        check_new(Path(output))
    with _in_this_process():
        overrides = as_overrides(settings or {})
        run = check_run(of_settings(space), overrides, asked, name=name, study=study, number=trial)
        record = run_one(run, _watch(progress)).record(0)
    if problem := record.error or record.broken:
        raise UserError(f"run '{name}' failed: {problem}")
    trained = Study(name, layout)
    if output is not None:
        trained.export(output)
    return trained


@checked
def load_study(name: str, *, storage_path: str | Path | None = None, study_database: str | None = None) -> Study:
    """A study that was begun before, or that runs elsewhere, to read.

    Args:
        name: the study's.
        storage_path: as `tune` takes it.
        study_database: the same.

    Raises:
        UserError: there is no such study.
    """
    return Study(name, _layout(storage_path, study_database))


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Leave the caller's process as it was, and tell it how to go on after an interruption."""
    with left_as_found():
        try:
            yield
        except KeyboardInterrupt as interrupt:
            interrupt.add_note("What is done is kept. Go on: the same call, with resume=True")
            raise


def _layout(storage_path: str | Path | None, study_database: str | None) -> Layout:
    path = Path(storage_path or os.environ.get("BILORA_RAY_STORAGE_PATH") or "runs")
    database = study_database or os.environ.get("BILORA_RAY_STUDY_DATABASE")
    return Layout(absolute(path), database)


def _say(progress: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if progress:
            print(line, file=sys.stderr)

    return say


def _watch(progress: bool) -> Watch:
    if not progress:
        return _Silent
    from bilora_ray.cli.progress import SearchProgress

    return SearchProgress


class _Silent:
    """A watcher that shows nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, records: list[TrialRecord]) -> None:
        """As `Watcher` says, with what follows."""

    def say(self, line: str) -> None:
        """Nothing is shown."""

    def trial_started(self, trial: TrialRecord) -> None:
        """Nothing is shown."""

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """Nothing is shown."""

    def trial_moves(self, number: int, moving: Moving) -> None:
        """Nothing is shown."""

    def trial_ended(self, trial: TrialRecord) -> None:
        """Nothing is shown."""
