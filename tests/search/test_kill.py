"""SIGKILL of the search at random moments, then --resume: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from tiny_trials import Tiny

from bilora_ray.search.layout import Layout
from bilora_ray.search.studies import load_study
from bilora_ray.tracking.records import Status

COMMAND = Path(sys.executable).with_name("bilora-ray")
NUM_TRIALS = 10
KILLS = 5
MAX_STEPS = 60
ORPHAN_WAIT_S = 30
SPACE = """
study: {{name: killed, num_trials: {num_trials}, seed: 3}}
trial:
  model_name_or_path: {model}
  task: causal-lm
  train_data: {data}
  max_length: 64
  max_steps: {max_steps}
  eval_steps: 5
  per_device_train_batch_size: 8
  rho: {{low: 0.01, high: 0.2, log: true}}
  learning_rate: {{low: 0.0001, high: 0.01, log: true}}
"""


def _start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [COMMAND, "tune", "--space", "space.yaml", *options]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """What the study database holds now, read as another process would; empty before the study is there."""
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/runs/studies.db")
        return optuna.load_study(study_name="killed", storage=storage).get_trials()
    except Exception:  # not there yet, or being made at this moment
        return []


def _wait_for_progress(folder: Path, process: subprocess.Popen[bytes], reports_before: int) -> None:
    """Until the search has told the study something that it did not hold before."""
    while process.poll() is None and sum(len(t.intermediate_values) for t in _trials(folder)) <= reports_before:
        time.sleep(0.2)


@pytest.mark.slow
def test_search_killed_five_times_finishes_each_trial_exactly_once(tmp_path: Path, tiny: Tiny) -> None:
    data = tiny.folder / "texts-train.jsonl"
    space = SPACE.format(num_trials=NUM_TRIALS, max_steps=MAX_STEPS, model=tiny.model("causal-lm"), data=data)
    (tmp_path / "space.yaml").write_text(space)
    moments = random.Random(20261123)
    ended: dict[int, optuna.trial.FrozenTrial] = {}
    in_flight: dict[int, int] = {}
    layout = Layout(tmp_path / "runs")
    for kill in range(KILLS):
        reports = sum(len(trial.intermediate_values) for trial in _trials(tmp_path))
        process = _start(tmp_path, *(["--resume"] if kill else []))
        _wait_for_progress(tmp_path, process, reports)
        time.sleep(moments.uniform(0.0, 1.5))
        assert process.poll() is None, (tmp_path / "log").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        for trial in _trials(tmp_path):
            if trial.state.is_finished():
                # What had ended before a kill is as it was after it.
                assert ended.setdefault(trial.number, trial) == trial
            elif kill % 2:  # else the next search begins while the workers of this one may still write
                folder = layout.trial("killed", trial.number)
                with folder.lock(ORPHAN_WAIT_S):
                    step = folder.state().get("step", 0)
                if 0 < step < MAX_STEPS:
                    in_flight[trial.number] = max(step, in_flight.get(trial.number, 0))
    assert _start(tmp_path, "--resume").wait() == 0, (tmp_path / "log").read_text()

    study = load_study(layout, "killed")
    records = study.records()
    assert [record.number for record in records] == list(range(NUM_TRIALS))
    assert {record.status for record in records} <= {Status.COMPLETE, Status.PRUNED}
    assert in_flight, "no kill met a trial with a checkpoint: the moments are chosen badly"
    for number, step in in_flight.items():
        # The verdict on a known evaluation may have died with the search: then the resumed trial stops where it was.
        state = study.folder(number).state()
        assert max(state["resumed_at"], default=0) >= step or state["step"] == step
    for number, trial in ended.items():
        assert study.study.trials[number] == trial
    for record in records:
        steps = [metrics["step"] for metrics in record.history]
        assert steps == sorted(set(steps))
        assert set(study.study.trials[record.number].intermediate_values) <= set(steps)
    _assert_mlflow_agrees(tmp_path, records)


def _assert_mlflow_agrees(folder: Path, records: list) -> None:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("bilora-ray")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    children = {int(r.data.tags["bilora_ray.trial"]): r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert len(children) == len(runs) - 1 == NUM_TRIALS
    for record in records:
        run = children[record.number]
        assert run.info.status == "FINISHED"
        assert run.data.tags["bilora_ray.status"] == record.status.value
        told = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, "eval_loss"))
        assert told == Counter(int(metrics["step"]) for metrics in record.history)
