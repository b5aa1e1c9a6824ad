"""One search, from a checked space to the study's last trial."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError

from bilora_ray.config import TEST_SETTINGS
from bilora_ray.errors import MachineError, TrialFailure, UserError, first_line
from bilora_ray.interruption import Interrupted, heard, noted
from bilora_ray.runners import runner_for
from bilora_ray.runners.scoring import score
from bilora_ray.runners.untrained import BesideBase
from bilora_ray.search.cluster.cluster import (
    capacity,
    check_address,
    check_dashboard,
    cluster,
    disconnect,
    is_own,
    nodes,
)
from bilora_ray.search.cluster.gpus import decided
from bilora_ray.search.cluster.shared_storage import check_shared
from bilora_ray.search.cluster.watchdog import head_watched
from bilora_ray.search.session import (
    LATE_S,
    Observers,
    Session,
    Watcher,
    session,
    tell_result,
    watching_moves,
    winner_in_words,
    write_page,
)
from bilora_ray.search.space import Space
from bilora_ray.search.study.control.finalists import Finals, begin, check_finalists, finals_of, keep_test
from bilora_ray.search.study.control.untrained import keep, to_compare
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import naming_the_database, running_study
from bilora_ray.search.study.studies import check_study
from bilora_ray.search.study.study import SearchStudy

# Tune would hand these on in a runtime environment, which Ray writes into its logs. No trial needs them.
SECRETS_OF_TUNE = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"})
# How long the end of a search whose cluster is dead waits for MLflow.
CLOSE_S = 15.0


def search(
    space: Space,
    layout: Layout,
    *,
    resume: bool,
    ray_address: str | None,
    mlflow_uri: str | None,
    digests: Mapping[str, str],
    watcher: Watcher,
    part: Mapping[str, Any] | None = None,
) -> SearchStudy:
    """Begin the study of `space`, or go on with it, until every trial has ended.

    Args:
        space: the checked space.
        layout: where the study database and the trials' folders are.
        resume: go on with a study that exists.
        ray_address: Ray cluster; None: one on this machine, for the time of the search.
        mlflow_uri: MLflow server or database; None: a SQLite file beside the studies.
        digests: source -> digest of its content.
        watcher: who shows the search to a person.
        part: attributes of a study that is a part of something larger: then Ray is connected already, by `joined`, and
            its winner is nothing by itself.

    Raises:
        UserError: the study, the cluster or MLflow are not there as said, and nothing was begun; or a trial met bad
            input; or the study database is gone.
        KeyboardInterrupt: of Ctrl-C, or of `bilora-ray stop`, once the trials are stopped and MLflow knows it.
    """
    with naming_the_database(layout, then=""):
        check_study(space, layout, resume, digests)
        check_finalists(space, layout)
    check_address(ray_address)
    with naming_the_database(layout), running_study(layout, space.study.name), ExitStack() as stack:
        joining = joined(space, layout, ray_address) if part is None else nullcontext()
        # A cluster that is there is joined in a moment, and looked at before the study begins. One of our own is not
        # there for seconds, and starts beside MLflow.
        if not is_own(ray_address):
            stack.enter_context(joining)
        if space.fixed.get("precision") == "auto":
            space = decided(space, is_own(ray_address))
            if space.resources.gpus_per_worker:
                watcher.say(f"precision: auto is {space.fixed['precision']} on these GPUs, for all trials")
        running = stack.enter_context(session(space, layout, mlflow_uri, digests, watcher, part))
        if is_own(ray_address):
            stack.enter_context(joining)
        stack.enter_context(head_watched(lambda: _end(running, ray_address)))
        study = running.study
        beside = BesideBase(space.resources.model_dump(), space.study.num_trials)
        # Of a search that trains finalists their study compares the winner.
        alone = not space.study.finalists and part is None
        observers = Observers([running.observers(), *([beside] if alone else [])])
        concurrent = at_once(space, watcher.say)
        stack.enter_context(watching_moves(study, watcher))
        run_trials(study, observers, concurrent)
        while study.await_others(Observers([watcher]), watcher.say):
            run_trials(study, observers, concurrent)
        if part is None:
            _beside_base(study, beside, watcher.say)
    return study


@contextmanager
def joined(space: Space, layout: Layout, ray_address: str | None) -> Iterator[None]:
    """Connect to the cluster at `ray_address`, or start one, for trials of `space` that the block runs.

    Raises:
        UserError: it does not answer, or its nodes do not share the storage path.
    """
    nested = runner_for(space.resources.model_dump()).starts_workers
    with cluster(ray_address, nested):
        if is_own(ray_address):
            with environment_inherited():
                yield
            return
        check_shared(layout.storage_path)
        if nested:
            check_dashboard(ray_address)
        yield


def _beside_base(study: SearchStudy, beside: BesideBase, say: Callable[[str], None]) -> None:
    """Have a study that has ended know what its winner gains, unless it does. A search is not lost for that."""
    try:
        asked = to_compare(study)
        if asked is None:
            return
        if study.space.resources.parallelism == "fsdp":
            say("Note: the winner is not compared with its base model, which is on no worker whole")
            return
        runs, number = asked.runs, asked.winner.number
        settings, digests = runs.config(number).model_dump(), runs.digests(number)
        late = threading.Timer(LATE_S, say, ["the winner is compared with its base model"])
        late.start()
        try:
            found = beside.compare(settings, runs.folder(number).path, asked.adapter, digests, asked.measured)
        finally:
            late.cancel()
        keep(asked, found.baseline, found.examples)
    except (UserError, TrialFailure, OSError) as error:
        say(f"Note: the winner is not compared with its base model ({first_line(error)}); --resume tries again")


def at_once(space: Space, say: Callable[[str], None]) -> int:
    """How many trials are run at one time. A person who says it may know of nodes that are still to come."""
    asked = space.study.max_concurrent
    try:
        room = capacity(space.resources, list(nodes().values()))
    except UserError as error:
        if asked is None:
            raise
        say(f"{error}; waiting for nodes that have them")
        return asked
    return asked or room


def search_finalists(
    study: SearchStudy,
    *,
    ray_address: str | None,
    mlflow_uri: str | None,
    digests: Mapping[str, str],
    watcher_of: Callable[[Space], Watcher],
) -> None:
    """Train the best trials of a search that has ended on fresh seeds, and tell its run in MLflow what came of it.

    Args:
        study: the search's.
        ray_address: as `search` takes it, with what follows.
        mlflow_uri: the same.
        digests: the same.
        watcher_of: who shows the finalists' study to a person, of its space.

    Raises:
        UserError: as `search`.
        KeyboardInterrupt: the same.
    """
    # So that nobody else goes on with the search, or deletes it, meanwhile.
    with running_study(study.layout, study.space.study.name):
        with naming_the_database(study.layout):
            begun = begin(study, digests)
        if begun is None:
            return
        space, resume = begun
        watcher = watcher_of(space)
        search(
            space,
            study.layout,
            resume=resume,
            ray_address=ray_address,
            mlflow_uri=mlflow_uri,
            digests=digests,
            watcher=watcher,
        )
        with naming_the_database(study.layout):
            finals = finals_of(study)
            if finals is None or finals.verdict is None:
                return
            test = finals.test or _score_once(study, finals, ray_address, watcher.say)
            write_page(study, watcher.say)
            metrics = {f"test_{key.removeprefix('eval_')}": value for key, value in test.items()}
            metric, winner = study.objective.metric, finals.winner
            assert winner is not None
            told = {**finals.verdict.as_metrics(metric), **metrics}
            tell_result(study, mlflow_uri, told, watcher.say, winner_in_words(finals.verdict, metric, winner.adapter))


def _score_once(
    study: SearchStudy, finals: Finals, ray_address: str | None, say: Callable[[str], None]
) -> Mapping[str, float]:
    """Measure the winner's adapter on the test rows, if there are any, and keep what comes out."""
    assert finals.verdict is not None
    assert finals.winner is not None
    settings = finals.study.config(finals.winner.number).model_dump()
    named = study.config(finals.verdict.winner.trial).model_dump(include=set(TEST_SETTINGS))
    adapter, resources = finals.winner.adapter, study.space.resources
    if adapter is None or not any(value is not None for value in named.values()):
        return {}
    with cluster(ray_address):
        task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_retries=0)(score)
        try:
            found = ray.get(task.remote(str(adapter), {**settings, **named}))
        except RayError as error:
            cause = first_line(getattr(error, "cause", None) or error)
            say(f"test_data: the winner could not be scored ({cause}); --resume tries again")
            return {}
    keep_test(finals, found)
    return found


def _end(running: Session, address: str | None) -> NoReturn:
    """End the process of a search that waits for a dead cluster, as the command line would: by one line and code 2."""
    line = "Ray stopped answering; go on with --resume"
    if not is_own(address):
        line = f"--ray-address {address}: the cluster stopped answering; start it again and go on with --resume"
    running.watcher.__exit__(None, None, None)
    running.watcher.say(f"Error: {line}")
    closing = threading.Thread(target=running.close, daemon=True)
    closing.start()
    closing.join(CLOSE_S)  # then Ray ends the process by itself, with another code
    os._exit(2)


def run_trials(study: SearchStudy, observers: Observers, concurrent: int) -> None:
    """Run the study's remaining trials with Tune.

    Raises:
        UserError: a trial met what stops all of them.
        MachineError: the study takes more of the disk than it may; those that ran have ended.
        KeyboardInterrupt: of Ctrl-C, or asked for from elsewhere, once Tune has stopped the trials.
    """
    if study.finished():
        return
    # Late: it takes half a second, in which a cluster of our own and MLflow's store begin already.
    from ray import tune
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    from bilora_ray.search.tuning import MAX_FAILURES, Silent, Steered, StudyScheduler, StudySearcher

    ENV_VARS_TO_PROPAGATE.difference_update(SECRETS_OF_TUNE)
    resources = study.space.resources.model_dump()
    runner = runner_for(resources)
    bundle = {name: amount for name, amount in runner.own(resources).items() if amount}
    scheduler = StudyScheduler(study, observers)
    # Tune would take Ctrl-C for itself, and neither tell that it came nor give it back.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with tempfile.TemporaryDirectory(prefix="bilora-ray-") as scratch, noted(), _leaving_ray():
        tune.Tuner(
            tune.with_resources(runner.run, tune.PlacementGroupFactory([bundle])),
            tune_config=tune.TuneConfig(
                num_samples=study.space.study.num_trials,
                max_concurrent_trials=concurrent,
                search_alg=StudySearcher(study, observers),
                scheduler=scheduler,
                reuse_actors=not runner.starts_workers,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                stop=Steered(study),
                name="search",
                verbose=0,
                progress_reporter=Silent(),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        ).fit()
        # Of a signal that came as the last trial ended Tune has asked no more: what follows would not hear of it.
        if (signal := heard()) is not None:
            raise Interrupted(signal)
    if scheduler.halted is not None:
        raise scheduler.halted
    if study.asked_to_stop() and not study.finished():
        raise KeyboardInterrupt
    if study.in_hand():
        numbers = ", ".join(map(str, study.in_hand()))
        raise MachineError(f"Ray ended trials that are not done ({numbers}); go on with --resume")
    if study.full is not None and not study.finished():
        raise study.full


@contextmanager
def _leaving_ray() -> Iterator[None]:
    """Have Ray kill the trials if the block is interrupted, before anybody waits for the last of what they write."""
    try:
        yield
    except Interrupted:
        disconnect()
        raise


@contextmanager
def environment_inherited() -> Iterator[None]:
    """Have Tune tell the trials' processes nothing of the environment, of which those of our own cluster have all.

    With nothing to be told, a trial gets a process that Ray has started already.
    """
    from ray.tune.execution.class_cache import DEFAULT_ENV_VARS, ENV_VARS_TO_PROPAGATE

    told, default = set(ENV_VARS_TO_PROPAGATE), dict(DEFAULT_ENV_VARS)
    ENV_VARS_TO_PROPAGATE.clear()
    DEFAULT_ENV_VARS.clear()
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.update(told)
        DEFAULT_ENV_VARS.update(default)
