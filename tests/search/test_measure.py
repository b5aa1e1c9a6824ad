"""The trials of an estimate, run on a Ray cluster: how many at one time, and what memory each of them could have."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from chaos.nodes import Nodes
from tiny_trials import Tiny

from bilora_ray.errors import UserError
from bilora_ray.runners.measuring import on_each, spare
from bilora_ray.search.cluster.cluster import cluster, nodes
from bilora_ray.search.readiness.machine import free_memory
from bilora_ray.search.readiness.measure import least_room, measure
from bilora_ray.search.space import ResourceConfig
from bilora_ray.search.space_file import load_space

GIB = 2**30
TRIAL = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "study.name=s")


def test_a_worker_shares_the_memory_of_its_own_node_and_of_no_other() -> None:
    has = {"large": {"CPU": 32.0}, "small": {"CPU": 4.0}}
    told = {"large": 256 * GIB, "small": 16 * GIB}
    resources = ResourceConfig()
    assert least_room(told, has, resources, workers=36) == 4 * GIB
    # No more share it than run at all.
    assert least_room(told, has, resources, workers=1) == 16 * GIB


def test_a_worker_has_its_part_of_the_smallest_gpu() -> None:
    has = {"a": {"CPU": 8.0, "GPU": 1.0}, "b": {"CPU": 8.0, "GPU": 8.0}}
    told = {"a": 24 * GIB, "b": 80 * GIB}
    assert least_room(told, has, ResourceConfig(gpus_per_worker=0.25), workers=4) == 6 * GIB
    assert least_room(told, has, ResourceConfig(gpus_per_worker=2), workers=4) == 24 * GIB


@pytest.mark.parametrize(
    ("count", "at_once", "more"), [(2, 1, 0), (3, 1, 0), (2, 2, 0), (3, 2, 1), (2, 6, 4), (2, 40, 6), (16, 40, 0)]
)
def test_none_is_measured_with_fewer_beside_it_than_in_the_search(count: int, at_once: int, more: int) -> None:
    assert spare(count, at_once) == more


def test_trials_of_which_each_worker_has_a_part_of_the_model_are_refused_before_anything_starts() -> None:
    space = load_space(None, [*TRIAL, "rank={choice: [4, 8]}", "resources.workers=2", "resources.parallelism=fsdp"])
    with pytest.raises(UserError, match=r"^estimate: resources\.parallelism: fsdp is not measured"):
        measure(space, "127.0.0.1:1")


@pytest.mark.slow
def test_the_extreme_trials_of_a_tiny_space_are_measured(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny.config("causal-lm", num_train_epochs=1, eval_steps=0.5).model_dump(exclude_unset=True)
    file = tmp_path / "space.yaml"
    study = {"name": "s", "num_trials": 6, "max_concurrent": 1, "rung_unit": "tokens"}
    file.write_text(json.dumps({"study": study, "trial": {**settings, "rank": {"choice": [2, 4]}}}))
    found = measure(load_space(file), None)
    assert (found.num_trials, found.at_once) == (6, 1)
    assert 2**27 < found.memory[0] <= found.memory[1] <= found.room
    assert found.adapter > 0
    assert 0 < found.trial_seconds.median < found.wall_seconds.median


@pytest.mark.slow
def test_each_node_of_a_cluster_is_asked_by_itself() -> None:
    def question() -> int:
        import os

        return os.environ.get("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES") == "1"

    with Nodes(cpus=1, gpus=1, others=1) as cluster_of_two, cluster(cluster_of_two.address):
        deadline = time.monotonic() + 60
        while len(has := nodes()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [(node["CPU"], node["GPU"]) for node in has.values()] == [(1.0, 1.0)] * 2
        assert on_each(list(has), question, gpus=True) == dict.fromkeys(has, True)
        assert all(free > GIB for free in on_each(list(has), free_memory, gpus=False).values())
