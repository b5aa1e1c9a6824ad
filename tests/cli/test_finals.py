"""What `show`, `export` and MLflow say of a study whose best were trained on fresh seeds."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.release import export as released
from bilora_ray.release import servers
from bilora_ray.search.session import artifacts_of, study_info, tell_result, winner_in_words
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import Finals, begin, finals_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri

SPACE = [
    *(
        "study.name=s",
        "study.scheduler=none",
        "study.num_trials=6",
        "study.finalists=2",
        "model_name_or_path=org/model",
    ),
    *("task=causal-lm", "train_data=org/data", "rho={low: 0.1, high: 0.9}"),
]


def curve(config: TrialConfig) -> list[Metrics]:
    loss = config.rho + 0.2 * Random(f"{config.rho} {config.seed}").gauss()
    return [{"step": 1, "max_steps": 1, "eval_loss": loss, "train_runtime": 1.0}]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchStudy:
    """A study in `runs` with two finalists, of which no run has begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    found = open_study(load_space(None, SPACE), Layout(tmp_path / "runs"), {})
    run(found)
    return found


def run(study: SearchStudy) -> None:
    simulate(study, curve, workers=1, keep=True)
    study.release()
    for record in study.records():
        assert record.adapter is not None
        record.adapter.mkdir(parents=True)


def train_finalists(study: SearchStudy) -> Finals:
    space, _ = begin(study, {}) or (None, False)
    assert space is not None
    run(open_study(space, study.layout, {}))
    found = finals_of(study)
    assert found is not None
    return found


def called(*arguments: str) -> Any:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result


def test_show_tells_the_single_run_from_the_score_and_how_far_it_fell(study: SearchStudy) -> None:
    finals = train_finalists(study)
    assert finals.verdict is not None
    assert finals.winner is not None
    verdict, winner = finals.verdict, finals.verdict.winner
    lines = called("show", "s").stdout.splitlines()
    assert "Finalists, each on 3 fresh seeds (study 's-finalists'):" in lines
    (line,) = (line for line in lines if line.startswith("Winner"))
    assert line.startswith(f"Winner: trial {winner.trial}, eval_loss {verdict.score:.6g}, {verdict.low:.4g} to ")
    assert line.endswith(f"than the {winner.single:.6g} of its single run in the search")
    assert any(line.startswith("Best: trial ") for line in lines)
    told = json.loads(called("show", "s", "--json").stdout)
    best = min(record.value for record in study.records() if record.value is not None)
    assert told["best"]["eval_loss"] == best
    found = told["finalists"]
    assert (found["score"], found["fell"], found["winner"]) == (verdict.score, verdict.fell, winner.trial)
    assert found["finalists"][0]["scores"] == list(winner.scores)
    assert found["adapter"] == str(finals.winner.adapter)


def test_before_they_have_ended_show_says_so_and_export_takes_the_best_single_run(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    monkeypatch.setattr(servers, "advice_on", lambda *_: servers.Advice({}, []))
    monkeypatch.setattr(released, "export_adapter", lambda adapter, *_: taken.append(adapter) or [])
    begin(study, {})
    assert "Finalists: 0 of 6 trainings have ended" in called("show", "s").stdout
    assert json.loads(called("show", "s", "--json").stdout)["finalists"]["score"] is None
    result = called("export", "s", "--output", "out")
    best = study.best()
    assert best is not None
    assert taken == [best.adapter]
    assert "its finalists are not all trained" in result.stderr


def test_export_takes_the_run_of_the_winner_with_the_middle_score(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[Path, dict[str, Any]]] = []

    def taking(adapter: Path, _: Path, origin: dict[str, Any], check: bool) -> list[str]:
        taken.append((adapter, origin))
        return []

    monkeypatch.setattr(servers, "advice_on", lambda *_: servers.Advice({}, []))
    monkeypatch.setattr(released, "export_adapter", taking)
    finals = train_finalists(study)
    assert finals.verdict is not None
    assert finals.winner is not None
    assert finals.winner.value == sorted(finals.verdict.winner.scores, key=lambda score: score or 0.0)[1]
    called("export", "s", "--output", "out")
    called("export", "s", "--trial", "4", "--output", "out")
    of_finalists = {"study": "s-finalists", "trial": finals.winner.number, "eval_loss": finals.winner.value}
    assert taken[0] == (finals.winner.adapter, of_finalists)
    assert taken[1][0] == study.record(4).adapter
    assert taken[1][1]["study"] == "s"


@pytest.mark.slow
def test_mlflow_has_the_score_beside_the_single_run_once(study: SearchStudy) -> None:
    uri, said = default_uri(study.layout.storage_path), list[str]()
    tracker = MlflowTracker.open(uri, "bilora-ray", artifacts_of(study.layout), study_info(study, {}), said.append)
    best = study.best()
    tracker.close(study.records(), None if best is None else best.number, interrupted=False)
    verdict = train_finalists(study).verdict
    assert verdict is not None
    for _ in range(2):
        tell_result(
            study, uri, verdict.as_metrics("eval_loss"), said.append, winner_in_words(verdict, "eval_loss", None)
        )
    assert said == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("bilora-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`bilora_ray.study` = 's'")
    assert run.data.metrics["finalist_eval_loss"] == pytest.approx(verdict.score)
    assert run.data.metrics["single_run_eval_loss"] == pytest.approx(verdict.winner.single)
    assert run.data.metrics["finalist_fell"] == pytest.approx(verdict.fell)
    assert len(client.get_metric_history(run.info.run_id, "finalist_eval_loss")) == 1
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"].count(f"**Winner of the finalists: trial {verdict.winner.trial},") == 1
    assert said == []
