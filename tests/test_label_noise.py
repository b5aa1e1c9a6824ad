"""The page of benchmarks/label_noise.py says of its comparisons what they were, whatever it is asked for now."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from benchmark_scripts import load


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("label_noise")


def outcome(trials: int, seeds: int) -> dict[str, Any]:
    entry = {"entry": "lora", "difference": None, "mean": 0.5, "verdict": "baseline"}
    tuned = {"trials": trials, "settings": {"learning_rate": 1e-3}}
    return {"entries": [{**entry, "tuned": tuned}], "seeds": list(range(seeds)), "sentences": [], "notes": []}


def test_trials_and_seeds_are_those_of_the_outcomes(script: ModuleType) -> None:
    assert "3 trials\nof tuning and 4 or 5 seeds" in script.told(
        {"0 %": outcome(3, 4), "20 %": outcome(3, 5), "20 %, at one rate": outcome(1, 5)}
    )


def test_only_a_comparison_that_has_begun_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    path = tmp_path / "compare.yaml"
    path.write_text("comparison: {name: noise-20}", encoding="utf-8")

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(SystemExit, match="run it again"):
            script.compare(argparse.Namespace(work=tmp_path), path)
        (tmp_path / "runs" / "studies" / "noise-20-tune-lora").mkdir(parents=True, exist_ok=True)
    assert ["--resume" in command for command in commands] == [False, True]


def test_at_one_rate_each_keeps_its_radius(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    methods = {"lora": {}, "bilora": {"rho": {"low": 0.1, "high": 1.0}}}
    content = {"comparison": {"name": "noise-20", "tune": 16}, "trial": {"learning_rate": None}, "methods": methods}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    settings: dict[str, Any] = {"lora": {"learning_rate": 1e-3}, "bilora": {"learning_rate": 2e-3, "rho": 0.5}}
    means = {"lora": 0.4, "bilora": 0.5}
    entries = [{"entry": one, "mean": means[one], "tuned": {"settings": settings[one]}} for one in means]
    path.with_suffix(".json").write_text(json.dumps({"entries": entries}), encoding="utf-8")
    found = yaml.safe_load(script.at_one_rate(path).read_text(encoding="utf-8"))
    assert found["comparison"] == {"name": "noise-20-rate", "tune": 1}
    assert found["methods"] == {"lora": {}, "bilora": {"rho": 0.5}}
    rate = found["trial"]["learning_rate"]
    assert rate["low"] < 2e-3 < rate["high"] < 1.01 * rate["low"]
