"""Names are names: none of them leads out of the storage path, and nothing that is there is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_trials import Tiny

from bilora_ray.cli.main import main

NOT_A_NAME = "must be up to 100 letters, digits, '.', '_' or '-', the first a letter or a digit"


@pytest.fixture(scope="module")
def storage(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path with one run, whose MLflow experiment is called like a path out of it."""
    folder = tmp_path_factory.mktemp("outside") / "a" / "b" / "runs"
    settings = tiny.config("causal-lm", max_steps=2).model_dump(exclude_unset=True)
    words = [f"--set={key}={value}" for key, value in settings.items()]
    result = run("train", "--storage-path", folder, *words, "--set=study.project=../../../escaped")
    assert result.exit_code == 0, result.output
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_project_is_no_path(storage: Path) -> None:
    outside = storage.parents[2]
    files = [path.relative_to(outside) for path in outside.rglob("*") if path.is_file()]
    assert files
    assert {path.parts[:3] for path in files} == {("a", "b", "runs")}
    assert list(storage.glob("mlflow-artifacts/*/artifacts/adapter/adapter_config.json"))


@pytest.mark.parametrize("name", ["../x", "..", ".", "/tmp/x", "a/b", "a\\b", "~", "-x", "a\nb", "a\0b", "x" * 101, ""])
def test_a_study_name_that_could_be_a_path_is_refused(name: str, storage: Path, tiny: Tiny) -> None:
    words = [f"--set={key}={value}" for key, value in tiny.config("causal-lm").model_dump(exclude_unset=True).items()]
    result = run("train", "--storage-path", storage, *words, "--name", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert NOT_A_NAME in result.stderr


@pytest.mark.parametrize("name", ["../train", "..", "/etc", "train/../train", "./train"])
@pytest.mark.parametrize("verb", ["show", "export"])
def test_a_study_is_found_by_its_name_only(verb: str, name: str, storage: Path, tmp_path: Path) -> None:
    words = ["--output", tmp_path / "out"] if verb == "export" else []
    result = run(verb, name, "--storage-path", storage, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: study '{name}': not in {storage}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["-1", "1", "99999999999999999999"])
def test_a_trial_is_one_that_there_is(number: str, storage: Path, tmp_path: Path) -> None:
    result = run("export", "train", "--storage-path", storage, f"--trial={number}", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert f"no trial {number}; it has 0 to 0" in result.stderr
    assert run("export", "train", "--storage-path", storage, "--trial=../0", "--output", "out").exit_code == 2


def test_an_export_overwrites_nothing(storage: Path, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    for output in (full, file):
        result = run("export", "train", "--storage-path", storage, "--output", output)
        assert (result.exit_code, result.stderr) == (2, f"Error: --output {output}: exists already\n")
    result = run("export", "train", "--storage-path", storage, "--output", file / "below")
    assert result.stderr == f"Error: --output {file / 'below'}: cannot be written (File exists)\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]
    assert (full / "mine").read_text() == file.read_text() == "mine"


@pytest.mark.parametrize("template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0.x}", "{../a}"])
def test_a_column_is_a_plain_name(template: str, tiny: Tiny, storage: Path) -> None:
    settings = {**tiny.config("causal-lm").model_dump(exclude_unset=True), "prompt_template": f"'{template}'"}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    result = run("train", "--storage-path", storage, *words)
    assert result.exit_code == 2
    assert "prompt_template" in result.stderr


@pytest.mark.parametrize("name", ["builtin:../../../etc/passwd", "builtin:/etc/passwd", "builtin:../x.jsonl"])
def test_a_builtin_name_is_one_of_a_list(name: str, tiny: Tiny, storage: Path) -> None:
    settings = {**tiny.config("causal-lm").model_dump(exclude_unset=True), "train_data": name}
    result = run("train", "--storage-path", storage, *(f"--set={key}={value}" for key, value in settings.items()))
    assert result.exit_code == 2
    assert f"train_data: no built-in '{name.removeprefix('builtin:')}'" in result.stderr
