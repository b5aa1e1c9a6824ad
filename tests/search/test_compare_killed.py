"""SIGKILL of a comparison in each of its stages, then --resume: each run once, each score once, the same table."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos.searches import COMMAND
from tiny_trials import Tiny

from bilora_ray.errors import UserError
from bilora_ray.search.study.control.comparisons import scores_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study
from bilora_ray.search.study.view import StudyView

FILE = """
comparison: {{name: c, tune: 2, seeds: 3}}
trial:
  model_name_or_path: {model}
  task: causal-lm
  train_data: {train}
  test_data: {test}
  max_length: 64
  max_steps: 24
  eval_steps: 4
  per_device_train_batch_size: 8
  learning_rate: {{low: 0.0001, high: 0.01, log: true}}
methods:
  lora: {{}}
  bilora: {{rho: {{low: 0.01, high: 0.2, log: true}}}}
"""
WAIT_S = 1800.0


def begin(folder: Path, storage: str, *options: str) -> subprocess.Popen[bytes]:
    command = [COMMAND, "compare", "c.yaml", "--storage-path", storage, "--json", f"{storage}.json", *options]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def study(folder: Path, name: str) -> StudyView | None:
    try:
        return load_study(Layout(folder / "killed"), name)
    except UserError:
        return None


def evaluations(folder: Path, name: str) -> int:
    found = study(folder, name)
    return 0 if found is None else sum(len(record.history) for record in found.records())


def scores(folder: Path) -> int:
    found = study(folder, "c-runs")
    return 0 if found is None else len(scores_of(found))


# In each stage, once something of it is there.
STAGES: list[Callable[[Path], bool]] = [
    lambda folder: evaluations(folder, "c-tune-bilora") > 1,
    lambda folder: evaluations(folder, "c-runs") > 3,
    lambda folder: scores(folder) > 0,
]


def wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert process.poll() is None, "it has ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.2)


def told(folder: Path, storage: str) -> dict[str, Any]:
    """The outcome less what the clock decides."""
    found = json.loads((folder / f"{storage}.json").read_text(encoding="utf-8"))
    kept = ("entry", "seed", "quality", "sharpness")
    return {
        "runs": [{key: run[key] for key in kept} for run in found["runs"]],
        "settings": [entry["tuned"]["settings"] for entry in found["entries"]],
        "differences": [entry["difference"] for entry in found["entries"]],
    }


@pytest.mark.slow
def test_a_comparison_killed_in_each_stage_ends_with_the_same_table(tmp_path: Path, tiny: Tiny) -> None:
    train, test = (tiny.folder / f"texts-{split}.jsonl" for split in ("train", "validation"))
    text = FILE.format(model=tiny.model("causal-lm"), train=train, test=test)
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert begin(tmp_path, "whole").wait(WAIT_S) == 0
    for index, stage in enumerate(STAGES):
        process = begin(tmp_path, "killed", *(["--resume"] if index else []))
        try:
            wait(process, lambda stage=stage: stage(tmp_path))
        finally:
            process.kill()
            process.wait()
    assert begin(tmp_path, "killed", "--resume").wait(WAIT_S) == 0, (tmp_path / "log").read_text()
    assert told(tmp_path, "killed") == told(tmp_path, "whole")
    runs = study(tmp_path, "c-runs")
    assert runs is not None
    assert [record.number for record in runs.records()] == list(range(6))
    assert sorted(scores_of(runs)) == list(range(6))
    for record in runs.records():
        steps = [metrics["step"] for metrics in record.history]
        assert steps == sorted(set(steps))
