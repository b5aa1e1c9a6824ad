"""GPUs that trials share. There is none here: Ray is told of some, and torch computes on CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chaos.nodes import Nodes
from tiny_trials import Tiny

from bilora_ray.errors import UserError
from bilora_ray.records import TrialRecord
from bilora_ray.search import run
from bilora_ray.search.cluster.cluster import capacity, cluster
from bilora_ray.search.run import run_trials
from bilora_ray.search.session import Observers
from bilora_ray.search.space import ResourceConfig
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.training.compute.memory import keep_to_share


@pytest.mark.parametrize(
    ("resources", "total", "room"),
    [
        ({"gpus_per_worker": 0.2}, {"CPU": 8, "GPU": 1}, 5),
        ({"gpus_per_worker": 0.1}, {"CPU": 16, "GPU": 1}, 10),
        ({"gpus_per_worker": 0.4}, {"CPU": 8, "GPU": 2}, 4),
        ({"gpus_per_worker": 0.6}, {"CPU": 8, "GPU": 2}, 2),
        ({"gpus_per_worker": 1}, {"CPU": 8, "GPU": 3}, 3),
        ({"gpus_per_worker": 2}, {"CPU": 8, "GPU": 5}, 2),
        ({"gpus_per_worker": 0.1}, {"CPU": 4, "GPU": 1}, 4),
        ({"cpus_per_worker": 0.2}, {"CPU": 1}, 5),
        ({"cpus_per_worker": 0.4}, {"CPU": 2}, 5),
        ({"gpus_per_worker": 1, "workers": 2}, {"CPU": 8, "GPU": 5}, 2),
    ],
)
def test_as_many_trials_run_as_there_is_room_for(resources: dict[str, Any], total: dict[str, float], room: int) -> None:
    assert capacity(ResourceConfig(**resources), [total]) == room


@pytest.mark.parametrize(
    ("resources", "nodes", "room"),
    [
        ({"cpus_per_worker": 8}, [{"CPU": 12}, {"CPU": 8}, {"CPU": 4}], 2),
        ({"gpus_per_worker": 1}, [{"CPU": 8, "GPU": 1}, {"CPU": 64}, {"CPU": 1, "GPU": 4}], 2),
        ({"gpus_per_worker": 2}, [{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], 2),
        ({"cpus_per_worker": 3, "workers": 2}, [{"CPU": 4}, {"CPU": 4}], 1),
        ({"cpus_per_worker": 3, "workers": 4, "min_workers": 2}, [{"CPU": 4}, {"CPU": 4}], 1),
    ],
)
def test_a_worker_has_all_that_it_gets_on_one_node(
    resources: dict[str, Any], nodes: list[dict[str, float]], room: int
) -> None:
    assert capacity(ResourceConfig(**resources), nodes) == room


def test_what_no_node_has_by_itself_is_refused_though_all_together_have_it() -> None:
    with pytest.raises(UserError) as caught:
        capacity(ResourceConfig(cpus_per_worker=8), [{"CPU": 4}] * 4)
    assert str(caught.value) == (
        "resources: a trial wants 8 CPUs and 0 GPUs, and there are 16 CPUs and 0 GPUs on 4 nodes, "
        "none of which has as much by itself"
    )


def test_who_says_how_many_run_at_one_time_hears_that_nodes_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "nodes", lambda: {"head": {"CPU": 4.0}})
    told: list[str] = []
    trial = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "rank={choice: [4, 8]}")
    space = load_space(None, [*trial, "study.name=s", "resources.cpus_per_worker=8"])
    with pytest.raises(UserError, match="a trial wants 8 CPUs"):
        run.at_once(space, told.append)
    space = replace(space, study=space.study.model_copy(update={"max_concurrent": 3}))
    assert run.at_once(space, told.append) == 3
    assert len(told) == 1
    assert told[0].endswith("there are 4 CPUs and 0 GPUs; waiting for nodes that have them")


def test_a_part_of_a_gpu_that_is_not_there_is_no_room() -> None:
    with pytest.raises(UserError) as caught:
        capacity(ResourceConfig(gpus_per_worker=0.5), [{"CPU": 8}])
    assert str(caught.value) == (
        "resources: a trial wants 1 CPUs and 0.5 GPUs, and there are 8 CPUs and 0 GPUs; "
        "without GPUs say resources.gpus_per_worker: 0"
    )


@pytest.mark.parametrize(("gpus", "limits"), [(0, []), (0.25, [0.1875]), (0.01, [0.01]), (1, []), (2, [])])
def test_a_trial_with_a_part_of_a_gpu_keeps_to_that_part_of_its_memory_less_what_cuda_takes(
    gpus: float, limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_limits.append)
    assert keep_to_share(gpus) == (limits or [1.0])[0]
    assert set_limits == limits


class Together:
    """Counts the trials that run at one time."""

    def __init__(self) -> None:
        self.reporting: set[int] = set()
        self.most = 0

    def trial_started(self, trial: TrialRecord) -> None:
        pass

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        self.reporting.add(trial.number)
        self.most = max(self.most, len(self.reporting))

    def trial_ended(self, trial: TrialRecord) -> None:
        self.reporting.discard(trial.number)


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    with Nodes(gpus=1) as nodes, cluster(nodes.address):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "together"), [(0.5, 2), (0.6, 1)])
def test_trials_share_a_gpu_as_far_as_it_goes(
    one_gpu: None, gpus: float, together: int, tiny: Tiny, tmp_path: Path
) -> None:
    settings = {**tiny.config("causal-lm", max_steps=100, eval_steps=2).model_dump(exclude_unset=True)}
    sections = {
        "study": {"name": "s", "num_trials": 2, "scheduler": "none"},
        "trial": {**settings, "rho": "{low: 0.01, high: 0.2}"},
        "resources": {"gpus_per_worker": gpus},
    }
    space = load_space(None, [f"{name}.{key}={v}" for name, values in sections.items() for key, v in values.items()])
    study, seen = open_study(space, Layout(tmp_path / "runs"), {}), Together()
    run_trials(study, Observers([seen]), 2)
    assert study.finished()
    assert seen.most == together
