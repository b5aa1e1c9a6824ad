"""What keeps a Ray cluster of our own to this machine and to this process: the loopback address, and a token."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray._private import ray_constants, services, utils, worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined] # compiled

from bilora_ray.errors import UserError

# A guess: what the logs of a small search take.
ROOM = 16 * 2**20
# Kills the groups that it is told of, once nobody can tell it of more. It must start at once, so it imports little.
GUARD = """
import os, sys
groups = [int(line) for line in sys.stdin]
for group in groups:
    try:
        os.killpg(group, 9)
    except OSError:
        pass
"""


@contextmanager
def private_ray() -> Iterator[None]:
    """Let a cluster that is started in the block listen on 127.0.0.1 only, and refuse who has not its token.

    The token is new and lives in the environment of this process and of those that Ray starts, and in no file. All is
    as before when the block ends.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # The workers of one trial talk to each other past Ray.
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    before = {key: os.environ.get(key) for key in environment}
    # Ray makes an address that others can reach of any that it is told, except where it expects no other machines.
    clusters_allowed = ray_constants.ENABLE_RAY_CLUSTER
    try:
        os.environ.update(environment)
        ray_constants.ENABLE_RAY_CLUSTER = False
        _forget_token()
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_allowed
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        _forget_token()


@contextmanager
def ends_with_us() -> Iterator[None]:
    """Have a cluster that is started in the block end when this process does, however that ends, and not before.

    What asks this process to end is apt to ask its whole group: a terminal, `timeout`. Ray would end by it before the
    search has ended its trials, which would wait for it in vain. So each of Ray's processes leads a session of its own,
    and a guard, which leads one too, kills what is left of them once this process is gone.
    """
    guard = subprocess.Popen([sys.executable, "-ISc", GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert guard.stdin is not None
    popen, names = services.ConsolePopen, vars(services)

    def started(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        process = popen(*arguments, **more, start_new_session=True)
        print(process.pid, file=guard.stdin, flush=True)
        return process

    names["ConsolePopen"] = started
    try:
        yield
    finally:
        names["ConsolePopen"] = popen
        guard.stdin.close()
        guard.wait()


@contextmanager
def signals_left_to_us() -> Iterator[None]:
    """In the block, Ray does not take SIGTERM for itself; its C++ would take it for a fault, and abort."""
    aborts, names = ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER, vars(utils)
    take_sigterm = utils.set_sigterm_handler
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    names["set_sigterm_handler"] = lambda _: None
    try:
        yield
    finally:
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = aborts
        names["set_sigterm_handler"] = take_sigterm


def kill_monitor() -> None:
    """Kill what would ask a cloud for more nodes: Ray asks it to end, and waits a second for that in vain."""
    node = worker._global_node
    if node is not None and ray_constants.PROCESS_TYPE_MONITOR in node.all_processes:
        node.kill_monitor(check_alive=False)


def check_room() -> None:
    """UserError where there is no room for Ray's own files: it would wait for them for minutes, and not say why."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with suppress(OSError):  # Ray makes it, or says why not
        free = shutil.disk_usage(folder).free
        if free < ROOM:
            line = f"{folder} has {free / 2**20:.1f} MiB left for Ray's own files, which want {ROOM / 2**20:.0f} MiB"
            raise UserError(f"Ray does not start here: {line}; free some, or name another folder in TMPDIR")


def _forget_token() -> None:
    """Have Ray read the environment again: it keeps the first token, and whether there is one, for the process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
