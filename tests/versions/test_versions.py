"""What an earlier version wrote is opened, shown, exported, measured, gone on with and extended by this one.

A folder here is a version's; make.py says what is in it.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import reproducible
from versions.make import KILLED, STUDY, fit, logits, run, trial_folder, trials

from bilora_ray.checking import completed
from bilora_ray.config import TrialConfig
from bilora_ray.training.folder import TrialFolder

HERE = Path(__file__).resolve().parent
VERSIONS = sorted(path.parent.name for path in HERE.glob("*/facts.json"))
# Another machine rounds otherwise.
CLOSE = {"rel": 1e-3, "abs": 1e-4}


@dataclass(frozen=True)
class Fixture:
    """A copy of a version's folder.

    Attributes:
        folder: the copy.
        facts: what that version said of it.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def storage_path(self) -> Path:
        """With the study."""
        return self.folder / "runs"

    def command(self, *arguments: str | Path) -> str:
        """What a command that reads the study prints."""
        return run(*arguments, f"--storage-path={self.storage_path}")

    def tune(self, *options: str) -> list[dict[str, Any]]:
        """Go on with the search; its trials then."""
        self.command("tune", f"--space={self.folder / 'space.yaml'}", "--resume", *options)
        return trials(self.storage_path)


@pytest.fixture(params=VERSIONS)
def fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Fixture:
    folder = shutil.copytree(HERE / request.param, tmp_path / request.param)
    return Fixture(folder, json.loads((folder / "facts.json").read_text()))


def same(trial: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a trial is as it was; later versions may say more of it."""
    return {key: trial.get(key) for key in before} == before


def test_there_are_versions() -> None:
    assert "0.1.0" in VERSIONS


def test_its_study_is_shown(fixture: Fixture) -> None:
    shown = fixture.command("show", STUDY)
    for number, status in enumerate(("complete", "stopped early", "failed", "interrupted")):
        assert re.search(rf"^ *{number} +{status} ", shown, re.MULTILINE)
    best = fixture.facts["trials"][fixture.facts["best"]]
    assert f"{best['eval_loss']:.6g}" in shown
    assert fixture.facts["trials"][2]["error"] in shown


def test_its_study_is_shown_as_json(fixture: Fixture) -> None:
    shown = json.loads(fixture.command("show", STUDY, "--json"))
    assert shown["best"]["number"] == fixture.facts["best"]
    assert len(shown["trials"]) == len(fixture.facts["trials"])
    for trial, before in zip(shown["trials"], fixture.facts["trials"], strict=True):
        assert same(trial, before)


def test_its_best_adapter_is_exported_and_plain_peft_loads_it(fixture: Fixture) -> None:
    exported = fixture.folder / "exported"
    fixture.command("export", STUDY, f"--output={exported}")
    weights, before = (folder / "adapter_model.safetensors" for folder in (exported, fixture.folder / "adapter"))
    assert weights.read_bytes() == before.read_bytes()
    assert logits(exported) == pytest.approx(fixture.facts["adapter"]["logits"], **CLOSE)


def test_its_exported_adapter_measures_what_it_did(fixture: Fixture) -> None:
    measured = json.loads(run("evaluate", fixture.folder / "adapter", "--json"))
    before = fixture.facts["adapter"]["evaluate"]
    assert {key: measured[key] for key in before} == pytest.approx(before, **CLOSE)
    best = fixture.facts["trials"][fixture.facts["best"]]
    assert measured["eval_loss"] == pytest.approx(best["eval_loss"], **CLOSE)


def test_a_fit_goes_on_from_its_checkpoint(fixture: Fixture) -> None:
    folder, before = fixture.folder / "checkpoint", fixture.facts["checkpoint"]
    step = TrialFolder(folder).state()["step"]
    # What is new since then did what that version did.
    told = fit(completed(TrialConfig, before["settings"]), folder)
    assert TrialFolder(folder).state()["resumed_at"] == [step]
    assert [report["step"] for report in told] == [report["step"] for report in before["evaluations"]]
    for report, whole in zip(reproducible(told), reproducible(before["evaluations"]), strict=True):
        assert {key: report[key] for key in whole} == pytest.approx(whole, **CLOSE)


@pytest.mark.slow
def test_its_search_goes_on_and_is_extended(fixture: Fixture) -> None:
    before = fixture.facts["trials"]
    step = trial_folder(fixture.storage_path, KILLED).state()["step"]
    finished = fixture.tune()
    assert len(finished) == len(before)
    assert all(same(trial, was) for trial, was in zip(finished[:KILLED], before[:KILLED], strict=True))
    gone_on = finished[KILLED]
    assert gone_on["status"] == "complete"
    assert gone_on["evaluations"][: len(before[KILLED]["evaluations"])] == before[KILLED]["evaluations"]
    assert gone_on["evaluations"][-1]["step"] == gone_on["evaluations"][-1]["max_steps"]
    assert trial_folder(fixture.storage_path, KILLED).state()["resumed_at"] == [step]
    extended = fixture.tune(f"--num-trials={len(before) + 1}")
    assert extended[:-1] == finished
    assert len(extended) == len(before) + 1
    assert extended[-1]["status"] in {"complete", "pruned", "failed"}
