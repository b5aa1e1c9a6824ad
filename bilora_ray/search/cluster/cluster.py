"""The Ray cluster of a search: one on this machine for its time, or one that is there already."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.job_config import JobConfig
from ray.util.state.exception import RayStateApiException

from bilora_ray.errors import UserError, first_line
from bilora_ray.runners.nested import ON_HEAD, name_cluster
from bilora_ray.search.cluster.own_ray import check_room, ends_with_us, kill_monitor, private_ray, signals_left_to_us
from bilora_ray.search.cluster.shared_storage import ANSWER_TIMEOUT_S
from bilora_ray.search.space import ResourceConfig

PORT = 6379
PROBE_TIMEOUT_S = 5.0
# Ray gives a node of its own half a minute to start, which a busy machine may not do in time: so often it is tried.
STARTS, SLOW_START = 3, "timed out during startup"
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    # How long an evaluation waits before the search hears of it, where a trial has several workers.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    # Who asks for no GPU sees none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Every report decides about a stop, so none may wait in a buffer; Tune's own snapshots are never read.
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# What the processes of trials with workers of their own need; on a cluster that is there they know nothing of ours.
NESTED = {
    "worker_process_setup_hook": name_cluster,
    "env_vars": {key: value for key, value in TUNE_ENVIRONMENT.items() if key.startswith("RAY_TRAIN_")},
}


class _WithoutCurrentFolder(JobConfig):
    """Keeps the folder that a search was started in, and that of its script, off the path of the trials' processes.

    Ray puts both before all packages, so that a `datasets.py` of the user's would be taken for the library.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


@contextmanager
def cluster(address: str | None, nested: bool = False) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one on this machine, for the block.

    Args:
        address: of the cluster; None: one on this machine.
        nested: whether trials start workers of their own. When such a trial is stopped, Ray Train asks the dashboard
            which of them live on; without it they would keep their place for ever.

    Raises:
        UserError: nothing answers at `address`, or this process is connected to a cluster already.
    """
    if ray.is_initialized():  # by the program whose process this is
        raise UserError("Ray runs in this process already; end it with ray.shutdown(), for a search starts its own")
    os.environ.update({key: value for key, value in TUNE_ENVIRONMENT.items() if key not in os.environ})
    own = is_own(address)
    if own:
        check_room()
    with signals_left_to_us(), ExitStack() as stack:
        if own:
            stack.enter_context(private_ray())
            stack.enter_context(ends_with_us())
        try:
            _init(address, own, nested)
        except Exception as error:  # Ray's node raises no other kind, where its folder cannot be written
            ray.shutdown()  # of a cluster of our own some processes may run already
            if AuthenticationError.__name__ in f"{error!r} {error.__context__!r}":
                hint = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
                raise UserError(f"--ray-address {address}: the cluster wants its token; {hint}") from None
            what = "Ray does not start here" if own else f"--ray-address {address}: no Ray cluster answers"
            raise UserError(f"{what} ({first_line(error)})") from None
        # Tune prints the traceback of every failed trial; the study keeps the line that matters.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            disconnect()


def _init(address: str | None, own: bool, nested: bool, starts: int = STARTS) -> None:
    try:
        ray.init(
            # Without an address Ray would join any cluster that it finds on this machine.
            address="local" if own else address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=nested if own else None,
            job_config=_WithoutCurrentFolder(),
            runtime_env=deepcopy(NESTED) if nested else None,  # Ray writes into it
        )
    except Exception as error:  # Ray says a plain Exception of a node that is late; any other is raised again
        if not own or starts == 1 or SLOW_START not in str(error):
            raise
        ray.shutdown()
        _init(address, own, nested, starts - 1)


def disconnect() -> None:
    """Leave the connected cluster, if there is one: it kills what runs there for this process. One of our own ends."""
    kill_monitor()
    ray.shutdown()


def is_own(address: str | None) -> bool:
    """Whether the cluster at `address` is one that a search starts for itself."""
    return address in (None, "local")


def total() -> dict[str, float]:
    """What the connected cluster has: `CPU`, `GPU`, and `nodes`."""
    alive = sum(bool(node["Alive"]) for node in ray.nodes())
    return {**{kind: ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}, "nodes": float(alive)}


def nodes() -> dict[str, Mapping[str, float]]:
    """Id -> what it has, of each node of the connected cluster."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def this_machine() -> dict[str, float]:
    """What a cluster of our own would have, or somewhat more: Ray leaves out what a container may not use."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def check_address(address: str | None) -> None:
    """Refuse an address where nothing listens: Ray itself would try it for minutes.

    Raises:
        UserError: nothing listens there, or it is not host:port.
    """
    if address in (None, "auto", "local"):
        return
    if address.startswith("ray://"):  # Tune would run on the head, where it finds no study
        raise UserError(f"--ray-address {address}: a search does not run over Ray Client; use bilora-ray submit")
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or PORT), PROBE_TIMEOUT_S):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--ray-address {address}: no Ray cluster answers ({reason})") from None


def check_dashboard(address: str | None) -> None:
    """Refuse the connected cluster, for trials with workers of their own, if its dashboard does not answer.

    Raises:
        UserError: it does not answer there where Ray Train asks it, on the head; or nothing of ours runs there.
    """
    task = ray.remote(_ask_dashboard).options(num_cpus=0, max_retries=0, resources=ON_HEAD)
    try:
        ray.get(task.remote(), timeout=ANSWER_TIMEOUT_S)
    except RayError as error:
        cause = getattr(error, "cause", error)
        line = f"its head cannot run this search ({first_line(cause)})"
        if isinstance(cause, RayStateApiException):
            line = (
                "its dashboard does not answer, and trials of several workers need it; "
                "start the head with --include-dashboard=true and ray[default]"
            )
        raise UserError(f"--ray-address {address}: {line}") from None


def _ask_dashboard() -> None:
    """Runs on the cluster: ask as Ray Train does. Raises whatever Ray does without an answer."""
    from ray.util.state import list_nodes

    list_nodes(limit=1)


def capacity(resources: ResourceConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials have room at one time on `nodes`, each given by what it has. UserError if it is none."""
    room = sum(workers_on(node, resources) for node in nodes)
    if room < (resources.min_workers or resources.workers):
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        have = f"{cpus:g} CPUs and {gpus:g} GPUs"
        if len(nodes) > 1:
            have += f" on {len(nodes)} nodes" + ("" if room else ", none of which has as much by itself")
        each = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
        workers = f"{resources.workers} workers with {each} each" if resources.workers > 1 else each
        hint = "" if gpus or not resources.gpus_per_worker else "; without GPUs say resources.gpus_per_worker: 0"
        raise UserError(f"resources: a trial wants {workers}, and there are {have}{hint}")
    return max(1, room // resources.workers)


def workers_on(node: Mapping[str, float], resources: ResourceConfig) -> int:
    """How many workers of trials have room at one time on a node that has `node`."""
    # 1 // 0.2 is 4: the float is a little more than a fifth.
    room = int(node.get("CPU", 0) / resources.cpus_per_worker + 1e-9)
    if gpus := resources.gpus_per_worker:
        whole = max(gpus, 1.0)  # a part is one of a single GPU: two GPUs are four times 0.4
        room = min(room, int(whole / gpus + 1e-9) * int(node.get("GPU", 0) / whole))
    return room
