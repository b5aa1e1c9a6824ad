"""The page of benchmarks/label_noise.py says of its comparisons what they were, whatever it is asked for now."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmark_scripts import load


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("label_noise")


def outcome(trials: int, seeds: int) -> dict[str, Any]:
    entry = {"entry": "lora", "difference": None, "mean": 0.5, "verdict": "baseline"}
    tuned = {"trials": trials, "settings": {"learning_rate": 1e-3}}
    return {"entries": [{**entry, "tuned": tuned}], "seeds": list(range(seeds)), "sentences": []}


def test_trials_and_seeds_are_those_of_the_outcomes(script: ModuleType) -> None:
    assert "3 trials\nof tuning and 4 or 5 seeds" in script.told({0: outcome(3, 4), 20: outcome(3, 5)})


def test_only_a_comparison_that_has_begun_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(SystemExit, match="run it again"):
            script.compare(argparse.Namespace(work=tmp_path), 20, tmp_path / "compare.yaml")
        (tmp_path / "runs" / "studies" / "noise-20-runs").mkdir(parents=True, exist_ok=True)
    assert ["--resume" in command for command in commands] == [False, True]
