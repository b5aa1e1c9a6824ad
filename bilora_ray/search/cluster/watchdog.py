"""Ends a search whose Ray cluster has lost its head."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

PROBE_EVERY_S, PROBE_TIMEOUT_S = 2.0, 5.0
# Ray itself waits for 60 s, and then ends the process without a word.
PATIENCE_S = 40.0


@contextmanager
def head_watched(on_loss: Callable[[], None]) -> Iterator[None]:
    """Call `on_loss` if the head of the connected cluster does not answer for `PATIENCE_S` seconds during the block.

    A head that cannot be reached from here in the first place is not watched.

    Args:
        on_loss: is called in a thread of its own, since the one that runs the block waits inside of Ray, where neither
            an exception nor a signal reaches it. It must end the process.
    """
    head = ray.get_runtime_context().gcs_address
    over = threading.Event()

    def watch() -> None:
        if not _answers(head):  # nor will it: the cluster is used from outside of its network
            return
        answered = time.monotonic()
        while not over.wait(PROBE_EVERY_S):
            if _answers(head):
                answered = time.monotonic()
            elif time.monotonic() - answered > PATIENCE_S:
                on_loss()
                return

    threading.Thread(target=watch, name="head-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
