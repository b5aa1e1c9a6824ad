"""What `compare` says before it begins, and where its outcome goes: what cannot be written is said at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from bilora_ray.cli.compare import _print_plan, _tell, _write
from bilora_ray.cli.main import main
from bilora_ray.errors import MachineError
from bilora_ray.evidence.outcome import Outcome, Run
from bilora_ray.library.asked import Asked
from bilora_ray.library.comparing import Checks
from bilora_ray.search.comparing.file import load_comparison
from bilora_ray.search.space.shipped import comparison_file
from bilora_ray.search.study.layout import Layout


@pytest.mark.parametrize("output", ["", "absent/outcome.json"])
def test_a_place_where_nothing_can_be_written_is_refused_at_once(output: str, tmp_path: Path) -> None:
    asked = ["compare", "quickstart", "--dry-run", "--json", str(tmp_path / output), "--storage-path", str(tmp_path)]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 2
    assert "must be a file in a folder that exists, or -" in found.output


OUTCOME = Outcome(
    name="c",
    metric="test_loss",
    greater_is_better=False,
    baseline="lora",
    budget="steps",
    runs=(Run("lora", 1, 0.5, float("inf"), None, None, 1.0, forgetting=float("nan")),),
    tuned=(),
)


def test_what_is_no_number_is_null_in_a_file_that_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "outcome.json"
    _write(OUTCOME, file)
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    (run,) = json.loads(text)["runs"]
    assert (run["quality"], run["sharpness"], run["forgetting"]) == (0.5, None, None)

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bilora_ray.search.comparing.told.as_text", full)
    with pytest.raises(MachineError, match="cannot be written"):
        _write(OUTCOME, file)
    assert file.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_hides_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = load_comparison(comparison_file("quickstart"))
    with pytest.raises(MachineError, match=r"--json /dev/full: cannot be written \(No space left on device\)"):
        _tell(OUTCOME, comparison, tmp_path, "/dev/full")
    assert "Comparison 'c': test_loss on 1 fresh seeds each" in capsys.readouterr().out


def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **changes: Any) -> str:
    comparison = load_comparison(comparison_file("quickstart"), [*overrides, "comparison.seeds=4", "comparison.tune=3"])
    checked: Any = SimpleNamespace(notes=(), test_rows=400)
    rehearsal: Any = SimpleNamespace(notes=(), rows={"train": SimpleNamespace(rows=240)})
    checks = Checks(comparison, Asked(layout=Layout(tmp_path)), checked)
    _print_plan(replace(checks, **changes), rehearsal)
    return capsys.readouterr().out


def test_a_plan_says_how_much_is_trained_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, capsys, "max_steps=60")
    assert "train each on 4 fresh seeds and score it once, at equal steps\n(60 steps): 18 + 24 trainings." in plan
    assert "train rows: 240\ntest rows: 400\n" in plan
    assert "(60 steps of lora, the others as long)" in planned(
        tmp_path, capsys, "max_steps=60", "comparison.budget=seconds"
    )


def test_a_plan_of_more_seeds_says_how_many_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Asked(layout=Layout(tmp_path), extend=5)
    plan = planned(tmp_path, capsys, "max_steps=60", asked=asked, seeds=4, entries=("lora", "lora-sam", "bilora"))
    assert "has tuned, and would train on 5 seeds more than its 4, each with its best settings:" in plan
    assert "at equal steps (60 steps): 15 trainings." in plan
    assert "would tune" not in plan
    assert "\n  lora (lora, the baseline)\n  lora-sam (lora-sam)\n  bilora (bilora)\nat equal" in plan
