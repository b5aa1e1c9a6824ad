"""Trials of two workers, Ray Train inside of Ray Tune, on a real Ray cluster of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from chaos.nodes import Nodes, ray_processes
from tiny_trials import Tiny, reproducible, run_fit

from bilora_ray.errors import UserError
from bilora_ray.records import Status, TrialRecord
from bilora_ray.search.cluster.cluster import cluster
from bilora_ray.search.run import run_trials
from bilora_ray.search.session import Observers
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.training.folder import TENSORS


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    # The other cluster, as on a machine that people share, must not be taken for the search's.
    with Nodes(), cluster(None, nested=True):
        yield


def search(
    tiny: Tiny,
    folder: Path,
    *observers: Any,
    study: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    **trial: Any,
) -> SearchStudy:
    config = tiny.config("causal-lm", max_steps=6, eval_steps=2, per_device_train_batch_size=3)
    sections = {
        "study": {"name": "s", "num_trials": 1, "scheduler": "none", **(study or {})},
        "trial": {**config.model_dump(exclude_unset=True), "rho": "{low: 0.01, high: 0.2}", **trial},
        "resources": {"workers": 2, **(resources or {})},
    }
    space = load_space(None, [f"{name}.{key}={v}" for name, values in sections.items() for key, v in values.items()])
    made = open_study(space, Layout(folder / "runs"), {})
    run_trials(made, Observers(observers), 1)
    return made


class Killer:
    """Kills one worker of Ray Train after the first report."""

    def __init__(self) -> None:
        self.killed = 0

    def trial_started(self, trial: TrialRecord) -> None:
        pass

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        if not self.killed:
            ray_processes(os.getpid(), "RayTrainWorker")[0].kill()
            self.killed += 1

    def trial_ended(self, trial: TrialRecord) -> None:
        pass


@pytest.mark.parametrize("parallelism", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_workers_in_a_search_find_what_one_finds(parallelism: str, tiny: Tiny, tmp_path: Path) -> None:
    study = search(tiny, tmp_path, resources={"parallelism": parallelism})
    (record,) = study.records()
    assert record.status is Status.COMPLETE
    config = study.config(0).model_copy(update={"per_device_train_batch_size": 6})
    one, _ = run_fit(config, tmp_path / "one")
    for wanted, given in zip(reproducible(one), reproducible(record.history), strict=True):
        assert given == pytest.approx(wanted, abs=1e-4, rel=1e-4)


@pytest.mark.slow
def test_weak_trials_of_several_workers_are_stopped_and_the_next_ones_run(tiny: Tiny, tmp_path: Path) -> None:
    study = {"num_trials": 3, "scheduler": "asha", "grace_period": 2, "reduction_factor": 3}
    study |= {"points_to_evaluate": "[{learning_rate: 0.01}, {learning_rate: 1.0e-9}, {learning_rate: 0.011}]"}
    made = search(tiny, tmp_path, study=study, learning_rate="{low: 1.0e-9, high: 0.1, log: true}")
    assert made.finished()
    assert made.records()[0].status is Status.COMPLETE
    assert made.records()[1].status is Status.PRUNED
    made.settle()  # its workers may have gone on until they heard of its end
    assert list(made.folder(1).path.rglob(TENSORS)) == []


@pytest.mark.slow
def test_a_killed_worker_costs_no_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    killer = Killer()
    # Long enough that the report of an evaluation comes before the end.
    made = search(tiny, tmp_path, killer, max_steps=150, eval_steps=50)
    (record,) = made.records()
    assert killer.killed == 1
    assert record.status is Status.COMPLETE
    assert [metrics["step"] for metrics in record.history] == [50, 100, 150]
    assert made.folder(0).state()["resumed_at"]


@pytest.mark.slow
def test_a_loss_that_explodes_on_the_workers_fails_the_trial_with_its_reason(tiny: Tiny, tmp_path: Path) -> None:
    (record,) = search(tiny, tmp_path, learning_rate=1e30, max_grad_norm="null").records()
    assert record.status is Status.FAILED
    assert record.error is not None
    assert record.error.startswith("loss is ")


@pytest.mark.slow
def test_bad_input_that_only_workers_see_ends_the_search_with_its_line(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        search(tiny, tmp_path, target_modules="[nothing_like_it]", resources={"parallelism": "fsdp"})
    assert str(error.value).startswith("target_modules: ")
