"""A trial on a machine with torch, transformers and PEFT: neither what searches is there, nor what reads the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("alembic", "bitsandbytes", "click", "datasets", "flash_attn", "mlflow", "optuna", "ray", "sqlalchemy")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
TRIALS = """
import pathlib, tempfile
from bilora_ray.quiet import quiet
quiet()
import bilora_ray.method
from gpu_trials import METHODS, quickstart
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import fit
with tempfile.TemporaryDirectory() as folder:
    for method in METHODS:
        config = quickstart(method=method, max_steps=1, max_train_samples=16, max_eval_samples=8)
        progress = fit(config, TrialFolder(pathlib.Path(folder, method)), lambda metrics: True)
        print(method, progress.best_step)
"""
COLLECTED = """
import pytest
sys.exit(pytest.main(["--collect-only", "-m", "gpu", "tests/gpu"]))
"""
BENCHMARK = """
import runpy
sys.argv = ["step_time.py", "--help"]
runpy.run_path("benchmarks/step_time.py", run_name="__main__")
"""


def output_of(program: str) -> str:
    """What `program` prints where the ABSENT packages cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{WITHOUT}\n{program}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trial_needs_none_of_what_searches() -> None:
    assert output_of(TRIALS).split("\n")[:2] == ["lora 1", "bilora 1"]


def test_the_tests_of_a_gpu_and_the_benchmark_need_none_of_it() -> None:
    collected = output_of(COLLECTED)
    assert "tests/gpu/test_method.py" in collected
    assert "tests/gpu/test_trials.py" in collected
    assert "--device" in output_of(BENCHMARK)
