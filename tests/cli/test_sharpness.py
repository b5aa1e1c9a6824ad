"""`bilora-ray sharpness`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_trials import Tiny, run_fit

from bilora_ray.cli.main import main
from bilora_ray.cli.sharpness import _draw
from bilora_ray.errors import MachineError
from bilora_ray.training.folder import TrialFolder


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter whose evaluations told its sharpness at 0.1."""
    folder = tmp_path_factory.mktemp("trial")
    run_fit(tiny.config("causal-lm", sharpness_radius=0.1, max_steps=4), folder)
    adapter = TrialFolder(folder).best_adapter()
    assert adapter is not None
    return adapter


def sharpness(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["sharpness", *map(str, arguments)])


def measured(*arguments: str | Path) -> dict[str, Any]:
    result = sharpness(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_an_adapter_is_measured_and_drawn(trained: Path, tmp_path: Path) -> None:
    result = sharpness(trained, "--radii", "0.2, 0.1", "--output", tmp_path / "flat.png")
    assert result.exit_code == 0, result.output
    assert "Full space" in result.stdout
    assert "LoRA space" in result.stdout
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["flat.png"]
    # In a log each part has a line.
    assert "Measuring, 8 of 8: top eigenvalue of the Hessian" in result.stderr


def test_it_agrees_with_what_the_training_told(trained: Path) -> None:
    found = measured(trained, "--radii", "0.1,0.2")
    assert found["radii"] == [0.1, 0.2]
    told = TrialFolder(trained.parents[1]).state()
    best = next(one for one in told["history"] if one["step"] == told["best_step"])
    assert found["full_space"]["adversarial"][0] == pytest.approx(best["sharpness"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    assert found["rows"] == 18
    for space in ("full_space", "lora_space"):
        assert all(len(found[space][key]) == 2 for key in ("adversarial", "m_sharpness"))
        assert found[space]["top_eigenvalue"]["error"] <= 0.01 * found[space]["top_eigenvalue"]["value"]


def test_a_batch_of_all_rows_has_the_rise_of_all_and_smaller_ones_a_greater(trained: Path) -> None:
    found = {m: measured(trained, "--radii", "0.1", "--m", str(m), "--set", "max_eval_samples=6") for m in (2, 6)}
    assert {m: of["m"] for m, of in found.items()} == {2: 2, 6: 6}
    small, whole = (found[m]["full_space"] for m in (2, 6))
    assert whole["m_sharpness"] == pytest.approx(whole["adversarial"], rel=1e-6)
    assert small["m_sharpness"][0] > 1.05 * whole["m_sharpness"][0]
    assert small["adversarial"] == pytest.approx(whole["adversarial"], rel=1e-6)


def test_the_base_model_has_no_factors(trained: Path) -> None:
    alone = measured(trained, "--base-model", "--radii", "0.1", "--set", "max_eval_samples=4")
    assert "lora_space" not in alone
    assert alone["full_space"]["adversarial"][0] > 0
    adapted = measured(trained, "--radii", "0.1", "--set", "max_eval_samples=4")
    assert alone["eval_loss"] > adapted["eval_loss"]
    assert alone["full_space"]["adversarial"] != adapted["full_space"]["adversarial"]


def test_a_picture_that_is_interrupted_or_has_no_folder_any_more_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilora_ray.report.sharpness.picture", lambda *_: b"picture")
    monkeypatch.setattr("os.fsync", interrupted)
    (folder := tmp_path / "folder").mkdir()
    with pytest.raises(KeyboardInterrupt):
        _draw(folder / "flat.png", {}, [], "")
    assert list(folder.iterdir()) == []
    folder.rmdir()
    folder.write_text("a file now")
    with pytest.raises(MachineError, match=r"flat.png: cannot be written \(Not a directory\)"):
        _draw(folder / "flat.png", {}, [], "")


def interrupted(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--radii", "0.1,x"], "--radii 0.1,x: must be numbers above 0 with commas between, got 'x'"),
        (["--radii", "0"], "--radii 0: must be numbers above 0 with commas between, got '0'"),
        (["--output", "flat.jpg"], "--output flat.jpg: must be a .png file in a folder that exists"),
        (["--output", "gone/flat.png"], "--output gone/flat.png: must be a .png file in a folder that exists"),
        ([], "gone: no such folder"),
    ],
)
def test_what_is_wrong_is_told_at_once(arguments: list[str], problem: str) -> None:
    result = sharpness("gone", *arguments)
    assert result.exit_code == 2
    assert result.stderr.strip() == f"Error: {problem}"
