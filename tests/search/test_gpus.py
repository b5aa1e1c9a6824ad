"""The precision that is left to the machine: decided once, when a study begins, and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from tiny_trials import Tiny

from bilora_ray.errors import UserError
from bilora_ray.search.cluster import gpus
from bilora_ray.search.preflight import pinned
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import check_study, open_study
from bilora_ray.training.compute import precision
from bilora_ray.training.distributed.workers import Workers
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run

NODES = [
    {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"GPU": 8.0}},
    {"NodeID": "b", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"CPU": 8.0}},
    {"NodeID": "c", "NodeManagerAddress": "10.0.0.3", "Alive": False, "Resources": {"GPU": 8.0}},
]


def space_of(tiny: Tiny, *settings: str) -> Space:
    trial = tiny.config("causal-lm").model_dump(exclude_unset=True)
    return load_space(None, ["study.name=s", *(f"trial.{key}={value}" for key, value in trial.items()), *settings])


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPUs compute in bf16, as far as it is asked."""
    for module in (precision, gpus):
        monkeypatch.setattr(module, "of_machine" if module is precision else "_of_machine", lambda: "bf16")


@pytest.mark.usefixtures("with_bf16")
@pytest.mark.parametrize(("gpus_per_worker", "decided"), [(0, "fp32"), (1, "bf16")])
def test_a_study_without_gpus_computes_in_fp32(gpus_per_worker: int, decided: str, tiny: Tiny) -> None:
    space = pinned(space_of(tiny, f"resources.gpus_per_worker={gpus_per_worker}"), None)
    assert space.fixed["precision"] == "auto"
    assert gpus.decided(space, own=True).fixed["precision"] == decided


@pytest.mark.parametrize("said", [[], ["precision=auto"]])
def test_a_resumed_study_goes_on_in_its_precision(said: list[str], tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "runs")
    begun = pinned(space_of(tiny), None)
    study = open_study(replace(begun, fixed={**begun.fixed, "precision": "bf16"}), layout, {})
    study.next_trials()
    resumed = pinned(space_of(tiny, *said), layout)
    assert resumed.fixed["precision"] == "bf16"
    check_study(resumed, layout, True, {})


def test_a_study_of_the_first_version_goes_on_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "runs")
    open_study(space_of(tiny), layout, {}).next_trials()  # which kept no setting that its file did not have
    assert pinned(space_of(tiny), layout).fixed["precision"] == "fp32"


def test_auto_is_no_choice(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"trial\.precision: auto is the one or the other"):
        space_of(tiny, "precision={choice: [auto, bf16]}")
    assert "precision" in space_of(tiny, "precision={choice: [fp32, bf16]}").distributions


def test_a_trial_goes_on_in_the_precision_of_its_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TrialFolder(tmp_path / "trial")
    config = tiny.config("causal-lm")
    assert config.precision == "auto"
    run = Run(config, folder)
    assert run.config.precision == "fp32"
    assert next(run.model.parameters()).dtype == torch.float32
    run.train_step()
    run.evaluate()
    monkeypatch.setattr(precision, "of_machine", lambda: "bf16")
    again = Run(config, folder)
    again.resume()
    assert again.config.precision == "fp32"
    recipe = json.loads(next(tmp_path.rglob("bilora_ray.json")).read_text())
    assert recipe["settings"]["precision"] == "fp32"
    assert Run(config, TrialFolder(tmp_path / "other")).config.precision == "bf16"


def test_workers_take_bf16_only_together(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "of_machine", lambda: "bf16")
    other: Any = SimpleNamespace(gather=lambda value: [value, "fp32"])
    assert precision.resolved(tiny.config("causal-lm"), other).precision == "fp32"
    assert precision.resolved(tiny.config("causal-lm"), Workers()).precision == "bf16"


def test_nodes_that_do_not_answer_are_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(gpus, "_ask", lambda node: f"task of {node}")
    monkeypatch.setattr(gpus.ray, "wait", lambda tasks, **_: ([], tasks))
    space = pinned(space_of(tiny, "resources.gpus_per_worker=1"), None)
    with pytest.raises(UserError, match=r"did not answer in 60 s, as busy ones do not: 10\.0\.0\.1;"):
        gpus.decided(space, own=False)
    monkeypatch.setattr(gpus.ray, "wait", lambda tasks, **_: (tasks, []))
    monkeypatch.setattr(gpus.ray, "get", lambda tasks: ["bf16" for _ in tasks])
    assert gpus.decided(space, own=False).fixed["precision"] == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpus_says_so_in_a_process_of_its_own() -> None:
    assert gpus._of_machine() == "fp32"


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("import sys; print('bf16'); raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("print('fp8')", "they say 'fp8'"),
        ("", "they say nothing"),
    ],
)
def test_a_machine_that_cannot_be_asked_decides_nothing(
    question: str, problem: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "QUESTION", question)
    space = pinned(space_of(tiny, "resources.gpus_per_worker=1"), None)
    with pytest.raises(UserError, match=rf"^precision: auto asks the GPUs, and .*{problem}.*; give precision: bf16, "):
        gpus.decided(space, own=True)


def test_what_a_node_says_is_wrong_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> None:
        raise RayTaskError("_of_machine", "a traceback", UserError("precision: what is wrong")).as_instanceof_cause()

    monkeypatch.setattr(gpus.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(gpus, "_ask", lambda node: f"task of {node}")
    monkeypatch.setattr(gpus.ray, "wait", lambda tasks, **_: (tasks, []))
    monkeypatch.setattr(gpus.ray, "get", failing)
    with pytest.raises(UserError, match=r"^precision: what is wrong$"):
        gpus.decided(pinned(space_of(tiny, "resources.gpus_per_worker=1"), None), own=False)
