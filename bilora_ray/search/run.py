"""One search, from a checked space to the study's last trial."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray
from ray import tune
from ray.tune.progress_reporter import ProgressReporter

from bilora_ray.errors import UserError, first_line
from bilora_ray.scale.trial import run_trial
from bilora_ray.search.session import Observers, Watcher, session
from bilora_ray.search.space import ResourceConfig, Space
from bilora_ray.search.storage import Layout, locked_study
from bilora_ray.search.study import SearchStudy, check_study
from bilora_ray.search.tuning import StudyScheduler, StudySearcher

# Tune retries a trial whose process died this often; the trial goes on from its checkpoint.
MAX_FAILURES = 2
CLIENT_PORT = 10001
PROBE_TIMEOUT_S = 5.0
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Every report decides about a stop, so none may wait in a buffer; Tune's own snapshots are never read.
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class _Silent(ProgressReporter):
    def should_report(self, trials: object, done: bool = False) -> bool:
        return False

    def report(self, trials: object, done: bool, *sys_info: object) -> None:
        pass


def search(
    space: Space,
    layout: Layout,
    *,
    resume: bool,
    ray_address: str | None,
    mlflow_uri: str | None,
    digests: Mapping[str, str],
    watcher: Watcher,
) -> tuple[SearchStudy, bool]:
    """Begin the study of `space`, or go on with it, until every trial has ended or Ctrl-C.

    Args:
        space: the checked space.
        layout: where the study database and the trials' folders are.
        resume: go on with a study that exists.
        ray_address: Ray cluster; None: one on this machine, for the time of the search.
        mlflow_uri: MLflow server or database; None: a SQLite file beside the studies.
        digests: data source -> digest of its content.
        watcher: who shows the search to a person.

    Returns:
        The study, and whether all of its trials have ended.

    Raises:
        UserError: the study, the cluster or MLflow are not there as said, and nothing was begun; or a trial met bad
            input.
    """
    check_study(space, layout, resume, digests)
    check_address(ray_address)
    with (
        locked_study(layout, space.study.name),
        session(space, layout, mlflow_uri, digests, watcher) as running,
        cluster(ray_address),
    ):
        study = running.study
        run_trials(study, running.observers(), space.study.max_concurrent or capacity(space.resources))
    return study, study.finished()


def run_trials(study: SearchStudy, observers: Observers, concurrent: int) -> None:
    """Run the study's remaining trials with Tune. UserError if a trial met what stops all of them."""
    if study.finished():
        return
    resources = {"cpu": study.space.resources.cpus_per_worker, "gpu": study.space.resources.gpus_per_worker}
    scheduler = StudyScheduler(study, observers)
    with tempfile.TemporaryDirectory(prefix="bilora-ray-") as scratch:
        tune.Tuner(
            tune.with_resources(run_trial, resources),
            tune_config=tune.TuneConfig(
                num_samples=study.space.study.num_trials,
                max_concurrent_trials=concurrent,
                search_alg=StudySearcher(study, observers),
                scheduler=scheduler,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                name="search",
                verbose=0,
                progress_reporter=_Silent(),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        ).fit()
    if scheduler.halted is not None:
        raise scheduler.halted


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one on this machine, for the block.

    Raises:
        UserError: nothing answers at `address`.
    """
    os.environ.update({key: value for key, value in TUNE_ENVIRONMENT.items() if key not in os.environ})
    try:
        ray.init(
            # Without an address Ray would join any cluster that it finds on this machine.
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if address else False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        what = f"--ray-address {address}: no Ray cluster answers" if address else "Ray does not start here"
        raise UserError(f"{what} ({first_line(error)})") from None
    # Tune prints the traceback of every failed trial; the study keeps the line that matters.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # A cluster stops a job with SIGTERM, which Ray has just taken: end as cleanly as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str | None) -> None:
    """Refuse an address, host:port or ray://host:port, where nothing listens: Ray itself would try it for minutes.

    Raises:
        UserError: nothing listens there, or it is no such address.
    """
    if address in (None, "auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or CLIENT_PORT), PROBE_TIMEOUT_S):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--ray-address {address}: no Ray cluster answers ({reason})") from None


def capacity(resources: ResourceConfig) -> int:
    """How many trials the cluster can run at one time. UserError if it is none."""
    total = ray.cluster_resources()
    fits = [int(total.get("CPU", 0) // resources.cpus_per_worker)]
    if resources.gpus_per_worker:
        fits.append(int(total.get("GPU", 0) // resources.gpus_per_worker))
    if min(fits) < 1:
        have = f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
        want = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
        raise UserError(f"resources: a trial wants {want}, the cluster has {have}")
    return min(fits)
