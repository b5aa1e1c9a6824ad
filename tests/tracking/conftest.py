"""A SQLite store of MLflow that all tests of this folder share: it takes seconds to make. Each has its own project."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bilora_ray.tracking import guard
from bilora_ray.tracking.mlflow_tracker import default_uri
from bilora_ray.tracking.store import ENVIRONMENT

from .tracked import Project


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path whose mlflow.db has its tables."""
    folder = tmp_path_factory.mktemp("storage")
    Project(default_uri(folder), "first", folder / "mlflow-artifacts").open()
    return folder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after the test what a tracker adds to the environment."""
    for key in ENVIRONMENT:
        monkeypatch.setenv(key, "to be restored")
        monkeypatch.delenv(key)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tracker try again at once after a failure."""
    monkeypatch.setattr(guard, "PAUSE_S", 0.0)


@pytest.fixture
def project(storage: Path, request: pytest.FixtureRequest) -> Project:
    """An MLflow experiment of the test's own."""
    return Project(default_uri(storage), request.node.name, storage / "mlflow-artifacts")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter."""
    folder = tmp_path / "step-00000030"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    return folder


@pytest.fixture
def port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each writing call of MLflow's client was made."""
    counts: dict[str, int] = {}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **kwargs)

        return wrapped

    for name in ("create_run", "log_batch", "log_artifacts", "log_inputs", "set_terminated", "update_run"):
        monkeypatch.setattr(MlflowClient, name, counting(name, getattr(MlflowClient, name)))
    return counts
