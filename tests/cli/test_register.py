"""`bilora-ray register`, and which trials MLflow is told are the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from bilora_ray.cli.main import main
from bilora_ray.records import Served
from bilora_ray.release import served as releasing
from bilora_ray.search.session import artifacts_of, served_of, study_info, told_of
from bilora_ray.search.simulated import simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import begin, finals_of, winner_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import StudyView
from bilora_ray.tracking import registry
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri
from bilora_ray.tracking.registry import Registered

from .test_finals import SPACE, curve


def run(study: SearchStudy) -> None:
    simulate(study, curve, workers=1, keep=True)
    study.release()
    for record in study.records():
        assert record.adapter is not None
        record.adapter.mkdir(parents=True)
        (record.adapter / "weights").write_text(str(record.number))


def track(study: StudyView, number: int) -> None:
    layout, said = study.layout, list[str]()
    uri, artifacts = default_uri(layout.storage_path), artifacts_of(layout)
    tracker = MlflowTracker.open(uri, "bilora-ray", artifacts, study_info(study, {}), said.append)
    tracker.close(study.records(), number, interrupted=False, told=told_of(study))
    assert said == []


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchStudy:
    """A study in `runs`; its adapters are files with their trials' numbers."""
    monkeypatch.chdir(tmp_path)

    def served(adapter: Path, origin: dict[str, Any]) -> Served:
        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / "weights").write_text((adapter / "weights").read_text())

        facts = {"base_model": "org/model", "license": "mit"}
        return Served("bilora_ray.release.served", ("prompt",), True, {"model_revision": None}, facts, None, write)

    monkeypatch.setattr(releasing, "served", served)
    found = open_study(load_space(None, SPACE), Layout(tmp_path / "runs"), {})
    run(found)
    return found


def called(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_the_best_is_registered_with_what_there_is_to_know_of_it(study: SearchStudy) -> None:
    best = study.best()
    assert best is not None
    track(study, best.number)
    result = called("register", "s", "--name", "fish", "--alias", "champion", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["name"], told["version"], told["uri"], told["license"]) == ("fish", 1, "models:/fish@champion", "mit")
    version = MlflowClient(default_uri(study.layout.storage_path)).get_model_version_by_alias("fish", "champion")
    assert version.tags["bilora_ray.trial"] == str(best.number)
    assert version.description.startswith(f"LoRA adapter of `org/model`: trial {best.number} of study `s`, eval_loss ")
    assert "champion" not in version.description  # which may be another version's tomorrow
    again = called("register", "s", "--name", "fish")
    assert again.stdout.startswith(f"Trial {best.number} of 's' was already version 1 of fish\n")
    assert "mlflow.pyfunc.load_model('models:/fish/1')" in again.stdout


def test_the_line_that_serves_it_is_one_of_a_shell_and_shows_no_password(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Registered("big fish", 3, "m-1", True)
    monkeypatch.setattr(registry, "register", lambda *_: made)
    told = called("register", "s", "--name", "big fish", "--mlflow-uri", "https://me:hidden@host").stdout
    assert "hidden" not in told
    assert "MLFLOW_TRACKING_URI='https://me:***@host' mlflow models serve -m 'models:/big fish/3' " in told


def test_of_finalists_the_winners_run_is_registered_and_marked_and_not_the_luckiest(study: SearchStudy) -> None:
    space, _ = begin(study, {}) or (None, False)
    assert space is not None
    best = study.best()
    assert best is not None
    track(study, best.number)
    early = called("register", "s", "--name", "early")
    assert early.stdout.startswith(f"Trial {best.number} of 's' is version 1 of early\n")
    assert early.stderr == "Note: the best single run is taken, for its finalists are not all trained\n"
    run(open_study(space, study.layout, {}))
    finals = finals_of(study)
    assert finals is not None
    assert finals.winner is not None
    luckiest = finals.study.best()
    assert luckiest is not None
    assert winner_of(finals.study) == finals.winner
    assert luckiest.number != finals.winner.number
    track(finals.study, finals.winner.number)
    result = called("register", "s", "--name", "fish", "--json")
    assert result.exit_code == 0, result.stderr
    client = MlflowClient(default_uri(study.layout.storage_path))
    (version,) = client.search_model_versions("name = 'fish'")
    assert version.tags["bilora_ray.study"] == "s-finalists"
    assert version.tags["bilora_ray.trial"] == str(finals.winner.number)
    (run_of_all,) = client.search_runs(["1"], "tags.`bilora_ray.study` = 's-finalists'")
    assert "These are the finalists of study 's'" in run_of_all.data.tags["mlflow.note.content"]
    # The search makes no model of its best single run: the winner's is the one to take.
    assert served_of(study, study.best()) is None
    assert served_of(finals.study, finals.winner) is not None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--name", "a/b"), "--name a/b: MLflow allows letters, digits, '_', '-', '.' and spaces"),
        (("--name", "fish", "--alias", "v1"), "--alias v1: MLflow allows letters, digits, '_' and '-', and neither"),
        (("--name", "fish"), "no such file"),
        (("--name", "fish", "--trial", "99"), "no trial 99; it has 0 to 5"),
    ],
)
def test_what_cannot_be_registered_is_one_line(study: SearchStudy, arguments: tuple[str, ...], line: str) -> None:
    result = called("register", "s", *arguments)
    assert result.exit_code == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
