"""`bilora-ray profile`: what it prints, and that nothing stays of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bilora_ray.cli.main import main
from bilora_ray.errors import TrialFailure
from bilora_ray.training.probe import profile as profiling

SPACE = Path(__file__).resolve().parents[2] / "search_spaces" / "quickstart.yaml"
SMALL = ("--steps", "1", "--set", "max_eval_samples=8", "--set", "max_train_samples=32")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["profile", "--space", str(SPACE), *words])


def test_the_quickstart_has_a_profile_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(*SMALL)
    assert printed.exit_code == 0, printed.output
    for word in ("tokens/s", "padding", "forward", "backward", "optimizer", "generation", "base weights", "TFLOP/s"):
        assert word in printed.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_has_the_same(tmp_path: Path) -> None:
    found = json.loads(run(*SMALL, "--json").stdout)
    assert found["step_rows"] == 16
    assert found["trial_steps"] == 24
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"base_weights", "adapters", "gradients", "optimizer_state", "kept_for_backward", "peak", "free"} == set(
        found["memory"]
    )
    assert {"tokens_per_second", "positions_per_second", "padding", "utilisation", "suggestions"} <= set(found)
    assert all({"setting", "value", "speedup", "reason"} == set(one) for one in found["suggestions"])


@pytest.mark.parametrize(
    ("resources", "visible", "given"),
    [
        ((), "", (1, 0, False)),
        (("gpus_per_worker=0.5",), "3", (1, 0.5, False)),
        (("gpus_per_worker=1", "workers=2", "parallelism=fsdp"), "3", (2, 1, True)),
    ],
)
def test_a_worker_has_what_resources_give_it(
    resources: tuple[str, ...], visible: str, given: tuple[int, float, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def profile(_: Any, steps: int, workers: int, gpus: float, sharded: bool) -> None:
        asked.append((os.environ["CUDA_VISIBLE_DEVICES"], (workers, gpus, sharded)))
        raise TrialFailure("enough")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(profiling, "profile", profile)
    found = run(*SMALL, *(word for one in resources for word in ("--set", f"resources.{one}")))
    assert found.stderr.splitlines()[-1].endswith("the trial failed: enough")
    assert asked == [(visible, given)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--set", "rnak=8"), "unknown key 'rnak'; did you mean 'rank'?"),
        (("--set", "model_name_or_path=nowhere"), "model_name_or_path"),
        (("--set", "train_data=nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str) -> None:
    found = run(*words)
    assert found.exit_code == 2
    assert found.stdout == ""
    assert line in found.stderr
    assert len(found.stderr.splitlines()) == 1
