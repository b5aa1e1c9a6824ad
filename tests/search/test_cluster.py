"""A Ray cluster that is there already: what a search finds out about it before its first trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.nodes import ENVIRONMENT, Nodes
from tiny_trials import Tiny

from bilora_ray.records import Status
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import study_names
from bilora_ray.search.study.studies import load_study

COMMAND = Path(sys.executable).with_name("bilora-ray")


def tune(tiny: Tiny, folder: Path, address: str) -> subprocess.CompletedProcess[str]:
    """Search on the cluster at `address`, with two workers a trial."""
    settings = tiny.config("causal-lm", max_steps=2, eval_steps=2).model_dump(exclude_unset=True)
    space = {
        "study": {"name": "s", "num_trials": 1, "scheduler": "none"},
        "trial": {**settings, "rho": {"low": 0.01, "high": 0.2}},
        "resources": {"workers": 2},
    }
    (folder / "space.yaml").write_text(json.dumps(space))
    command = [COMMAND, "tune", "--space=space.yaml", f"--ray-address={address}"]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_cluster_without_a_dashboard_runs_no_trials_of_several_workers(tiny: Tiny, tmp_path: Path) -> None:
    with Nodes(dashboard=False) as nodes:
        result = tune(tiny, tmp_path, nodes.address)
    assert result.stderr.endswith(  # after what was being done, on a slow machine
        f"Error: --ray-address {nodes.address}: its dashboard does not answer, and trials of several workers need it; "
        "start the head with --include-dashboard=true and ray[default]\n"
    )
    assert (result.returncode, study_names(Layout(tmp_path / "runs"))) == (2, [])


@pytest.mark.slow
def test_a_cluster_with_a_dashboard_runs_trials_of_several_workers(tiny: Tiny, tmp_path: Path) -> None:
    with Nodes() as nodes:
        result = tune(tiny, tmp_path, nodes.address)
    assert result.returncode == 0, result.stderr
    assert load_study(Layout(tmp_path / "runs"), "s").record(0).status is Status.COMPLETE
