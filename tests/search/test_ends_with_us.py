"""Ray's processes hear no signal to the group of a search, and are gone once the search is, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest
from ray._private import ray_constants, services, utils

from bilora_ray.search.cluster.own_ray import ends_with_us, signals_left_to_us

# Stands for a search: one of Ray's processes, and below it one of which Ray's does not know.
SEARCH = """
import sys, time
from ray._private import services
from bilora_ray.search.cluster.own_ray import ends_with_us
with ends_with_us():
    raylet = services.ConsolePopen(["sh", "-c", "sleep 600 & wait"])
    print(raylet.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("group", [False, True])
def test_what_is_killed_leaves_nothing_behind(group: bool) -> None:
    search = subprocess.Popen([sys.executable, "-c", SEARCH], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert search.stdout is not None
    raylet = psutil.Process(int(search.stdout.readline()))
    while not (below := raylet.children()):
        pass
    assert os.getpgid(raylet.pid) == raylet.pid != search.pid
    (os.killpg if group else os.kill)(search.pid, signal.SIGKILL)
    search.wait()
    _, left = psutil.wait_procs([raylet, *below], timeout=30)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []


def test_all_is_left_to_ray_again_after_the_block() -> None:
    before = services.ConsolePopen, utils.set_sigterm_handler, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    handler = signal.getsignal(signal.SIGTERM)
    with ends_with_us(), signals_left_to_us():
        assert services.ConsolePopen is not before[0]
        assert ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER is True
        utils.set_sigterm_handler(lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) is handler
    after = services.ConsolePopen, utils.set_sigterm_handler, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    assert after == before
