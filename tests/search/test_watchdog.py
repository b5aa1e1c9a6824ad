"""The watch over a cluster's head."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest

from bilora_ray.search.cluster import watchdog
from bilora_ray.search.cluster.watchdog import head_watched

WAIT_S = 30


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """Something that listens where the head does."""
    monkeypatch.setattr(watchdog, "PROBE_EVERY_S", 0.02)
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.2)
    server = socket.create_server(("127.0.0.1", 0))
    context = SimpleNamespace(gcs_address=f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    return server


def test_a_head_that_is_gone_is_reported_once(head: socket.socket) -> None:
    losses = []
    lost = threading.Event()

    def on_loss() -> None:
        losses.append(1)
        lost.set()

    with head_watched(on_loss):
        # The watch begins with a head that answers.
        assert not lost.wait(0.5)
        head.close()
        assert lost.wait(WAIT_S)
        lost.clear()
        assert not lost.wait(0.5)
    assert losses == [1]


def test_a_head_that_is_away_for_a_moment_is_not_lost(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE_S", 2.0)
    lost = threading.Event()
    with head_watched(lost.set):
        for _ in range(2):
            address = head.getsockname()
            head.close()
            assert not lost.wait(1.2)
            head = socket.create_server(address)
            assert not lost.wait(0.2)
    head.close()


def test_a_head_that_never_answered_is_not_watched(head: socket.socket) -> None:
    head.close()
    lost = threading.Event()
    with head_watched(lost.set):
        assert not lost.wait(0.5)


def test_the_watch_ends_with_its_block(head: socket.socket) -> None:
    lost = threading.Event()
    with head_watched(lost.set):
        pass
    head.close()
    assert not lost.wait(0.5)
