"""The space files that ship with the package: by name, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bilora_ray.cli.main import main
from bilora_ray.errors import UserError
from bilora_ray.search.cluster.upload import check_upload, read_upload
from bilora_ray.search.space import shipped as shipped_module
from bilora_ray.search.space.shipped import shipped, shipped_name, space_file
from bilora_ray.search.space_file import load_space

SHIPPED = Path(__file__).resolve().parents[2] / "search_spaces"
LOCAL = "study: {name: mine}\ntrial: {model_name_or_path: builtin:quickstart/model, task: causal-lm, train_data: %s}\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_each_file_has_a_name() -> None:
    assert {name: path.name for name, path in shipped().items()} == {
        file.stem: file.name for file in SHIPPED.glob("*.yaml")
    }


@pytest.mark.parametrize("name", sorted(shipped()))
def test_each_is_read_from_any_folder(name: str) -> None:
    assert load_space(space_file(name)).distributions


def test_validate_takes_a_name() -> None:
    done = CliRunner().invoke(main, ["validate", "quickstart"])
    assert done.exit_code == 0, done.output
    assert "study 'quickstart', 12 trials" in done.output


@pytest.mark.parametrize("written", ["quickstart.yaml", "./quickstart", "spaces/quickstart"])
def test_what_is_written_as_a_path_is_one(written: str) -> None:
    assert space_file(written) == Path(written)


def test_a_bare_word_is_a_name_whatever_is_in_the_folder() -> None:
    Path("quickstart").write_text("study: {name: mine}")
    Path("quickstart.yaml").write_text("study: {name: mine}")
    assert load_space(space_file("quickstart")).study.name == "quickstart"


def test_a_name_that_none_has_is_told_with_the_nearest() -> None:
    done = CliRunner().invoke(main, ["tune", "--space", "quickstrat"])
    line = "no space 'quickstrat' ships with bilora-ray; a file is written with its suffix or folder"
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"Error: {line}; did you mean 'quickstart'?\n"
    with pytest.raises(UserError, match="allowed: beans_vit, chat, "):
        space_file("mine")


def test_data_beside_a_shipped_file_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "own.yaml").write_text(LOCAL % "rows.jsonl")
    monkeypatch.setattr(shipped_module, "folder", lambda: tmp_path)
    assert load_space(space_file("own")).fixed["train_data"] == str(tmp_path / "rows.jsonl")


def test_a_job_gets_the_name_of_what_is_in_no_upload(tmp_path: Path) -> None:
    space = load_space(space_file("quickstart"))
    assert check_upload(read_upload(tmp_path), space, []) == "quickstart"
    assert check_upload(read_upload(SHIPPED), space, []) == Path("quickstart.yaml")


def test_a_file_of_the_same_name_elsewhere_is_no_shipped_one() -> None:
    Path("quickstart.yaml").touch()
    assert shipped_name(Path("quickstart.yaml")) is None
