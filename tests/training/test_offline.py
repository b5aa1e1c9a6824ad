"""Once a model of the Hub is here, nothing that a trial or an export does reaches for the network."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_trials import KINDS, METHODS, TASKS, Tiny, evaluate_adapter, run_fit

from bilora_ray import paths
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.paths import OPTIONAL, OPTIONAL_OF_IMAGES, is_cached
from bilora_ray.recipe import evaluation_config
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.model import load_base, load_tokenizer

GENERATION = "generation_config.json"
NAME = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOCAL = ("localhost", "127.0.0.1", "::1")


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The hosts that are reached for: there is no network, and the Hub's libraries may use it."""
    hosts: list[Any] = []

    def away(host: Any) -> bool:
        if host not in LOCAL:
            hosts.append(host)
        return host not in LOCAL

    def connect(own: socket.socket, address: Any) -> None:
        if own.family != socket.AF_UNIX and away(address[0]):
            raise OSError(101, "Network is unreachable")
        to_connect(own, address)

    def look_up(host: Any, *more: Any, **other: Any) -> Any:
        if away(host):
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return to_look_up(host, *more, **other)

    to_connect, to_look_up = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    huggingface_hub.close_session()
    yield hosts
    huggingface_hub.close_session()


def cached(model: Path, commit: str = COMMIT) -> Path:
    """Puts a model into the Hub's cache, as transformers leaves it there."""
    folder = Path(constants.HF_HUB_CACHE, "models--someone--model")
    shutil.copytree(model, folder / "snapshots" / commit)
    missing = folder / ".no_exist" / commit
    missing.mkdir(parents=True)
    for name in {*OPTIONAL, *OPTIONAL_OF_IMAGES, GENERATION}:
        if not (model / name).exists():
            (missing / name).touch()
    return folder


def of_the_hub(tiny: Tiny, task: Task, **settings: Any) -> TrialConfig:
    return tiny.config(task, model_name_or_path=NAME, model_revision=COMMIT, max_steps=4, **settings)


def test_the_network_is_watched(tiny: Tiny, reached: list[Any]) -> None:
    with pytest.raises(UserError):
        load_tokenizer(of_the_hub(tiny, "causal-lm"))
    assert set(reached) == {"huggingface.co"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_a_trial_of_a_cached_model_and_what_comes_of_it_reach_nowhere(
    task: Task, method: str, tiny: Tiny, tmp_path: Path, reached: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.folder)
    cached(tiny.model(task))
    texts = {} if task in KINDS else {"predict_with_generate": True, "max_new_tokens": 3}
    config = of_the_hub(tiny, task, method=method, **texts)
    run_fit(config, tmp_path / "trial")
    assert run_fit(config, tmp_path / "trial")[1].resumed_at == [4]
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    origin = {"study": "s", "trial": 0}
    export_adapter(adapter, tmp_path / "exported", origin)
    export_merged(adapter, tmp_path / "merged", origin)
    for folder in (tmp_path / "exported", tmp_path / "merged"):
        evaluate_adapter(folder if folder.name == "exported" else None, evaluation_config(folder, {}))
    assert reached == []


def test_a_commit_whose_ends_of_a_text_are_unknown_is_asked_for(tiny: Tiny, reached: list[Any]) -> None:
    folder = cached(tiny.model("causal-lm"))
    for place in (folder / "snapshots" / COMMIT, folder / ".no_exist" / COMMIT):
        (place / GENERATION).unlink(missing_ok=True)
    assert is_cached(NAME, COMMIT)
    assert not is_cached(NAME, COMMIT, GENERATION)
    config = of_the_hub(tiny, "causal-lm")
    tokenizer = load_tokenizer(config)
    assert reached == []
    load_base(config, tokenizer, None)  # the Hub is away, so that what its config.json makes up has to do
    assert set(reached) == {"huggingface.co"}


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_commit_that_is_not_whole_is_asked_for(lost: str, tiny: Tiny) -> None:
    folder = cached(tiny.model("causal-lm"))
    assert is_cached(NAME, COMMIT)
    (folder / "snapshots" / COMMIT / lost).unlink()
    assert not is_cached(NAME, COMMIT)


def test_weights_in_parts_are_whole_with_all_parts(tiny: Tiny) -> None:
    snapshot = cached(tiny.model("causal-lm")) / "snapshots" / COMMIT
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    parts = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(parts)
    assert not is_cached(NAME, COMMIT)
    (snapshot / "model-00002-of-00002.safetensors").touch()
    assert is_cached(NAME, COMMIT)


def test_what_may_have_moved_and_what_is_local_is_not_known_to_be_cached(tiny: Tiny) -> None:
    folder = cached(tiny.model("causal-lm"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    assert paths.cached_commit(NAME, None) == COMMIT
    assert not is_cached(NAME, None)
    assert not is_cached(NAME, "main")
    assert not is_cached(str(tiny.model("causal-lm")), COMMIT)
    assert not is_cached("builtin:quickstart/model", COMMIT)


def test_a_file_that_is_missing_after_all_is_asked_for(tiny: Tiny, reached: list[Any]) -> None:
    folder = cached(tiny.model("causal-lm"))
    (folder / "snapshots" / COMMIT / "tokenizer.json").unlink()
    with pytest.raises(UserError):
        load_tokenizer(of_the_hub(tiny, "causal-lm"))
    assert set(reached) == {"huggingface.co"}
