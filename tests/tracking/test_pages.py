"""What a person reads in MLflow's pages: names, descriptions, the order of metrics, a view of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bilora_ray.records import Objective, Status
from bilora_ray.tracking.pages import (
    LONGEST_NAME,
    NOTE,
    TRAINING,
    VIEW,
    baseline_line,
    run_name,
    view_of,
    with_winner,
)

from .tracked import Project, record

MATCH = Objective("eval_exact_match", greater_is_better=True)
SAMPLED = {"method": "bilora", "rank": 8, "auxiliary_rank": 8, "rho": 0.005349734706102321, "learning_rate": 0.00595}


def evaluation(step: int, match: float) -> dict[str, float]:
    told = {"step": step, "max_steps": 30, "epoch": 1.0, "learning_rate": 0.01, "adapter_mb": 3.0}
    return {**told, "eval_loss": 1 / step, "eval_exact_match": match}


def test_the_name_of_a_run_says_its_settings() -> None:
    assert run_name(record(5, sampled=SAMPLED)) == "trial 5: bilora r8 a8 rho 0.0053 lr 0.006"
    assert run_name(record(5, sampled={})) == "trial 5"
    assert run_name(record(1, sampled={"model_name_or_path": "/models/tiny", "seed": 3})) == "trial 1: tiny seed 3"
    many = run_name(record(0, sampled={f"setting_{number}": number for number in range(40)}))
    assert len(many) == LONGEST_NAME
    assert many.endswith("…")


def test_the_judged_metric_goes_first_and_a_counter_is_no_metric(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    log_batch = MlflowClient.log_batch

    def noting(self: MlflowClient, run_id: str, metrics: tuple = (), **rest: object) -> None:  # type: ignore[type-arg]
        logged.extend(metric.key for metric in metrics)
        log_batch(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", noting)
    project.open(objectives=(MATCH,)).trial_reported(record(), evaluation(10, 0.5))
    assert logged[:2] == ["best_eval_exact_match", "eval_exact_match"]
    assert set(logged[2:]) == {"epoch", "current_learning_rate", "adapter_mb", "eval_loss"}


def test_the_best_so_far_can_be_sorted_by_while_a_trial_runs(project: Project) -> None:
    history = [evaluation(step, match) for step, match in ((10, 0.5), (20, 0.75), (30, 0.25))]
    tracker = project.open(objectives=(MATCH,))
    tracker.trial_started(record(history=history))
    assert project.steps(0, "best_eval_exact_match") == [(10, 0.5), (20, 0.75), (30, 0.75)]
    done = record(0, Status.COMPLETE, history=history, value=0.75, values={"eval_exact_match": 0.75})
    tracker.close([done], 0, interrupted=False)
    assert len(project.steps(0, "best_eval_exact_match")) == 3
    assert project.trials()[0].data.metrics["eval_exact_match"] == 0.25


def test_a_study_and_its_trials_describe_themselves_and_link_to_each_other(project: Project, adapter: Path) -> None:
    settings = {"sampled": SAMPLED, "values": {"eval_loss": 0.01}, "adapter": adapter}
    best = record(5, Status.COMPLETE, steps=3, value=0.01, **settings)
    failed = record(6, Status.FAILED, error="loss is nan | at step 5")
    project.open().close([best, failed], 5, interrupted=False, told=["To compare with: nothing"])
    parent, trials = project.parent(), project.trials()
    here = f"#/experiments/{parent.info.experiment_id}/runs/"
    note = parent.data.tags[NOTE]
    assert note.startswith(f"**Best: [trial 5]({here}{trials[5].info.run_id}?{TRAINING}), eval_loss 0.01**")
    assert "| learning_rate | 0.00595 |" in note
    assert f"Adapter: `{adapter}`" in note
    assert f"bilora-ray export fish --storage-path {project.artifact_root.parent} --output fish-adapter" in note
    assert "2 trials: 1 complete, 1 failed." in note
    assert "- To compare with: nothing\n" in note
    of_best, of_failed = (trials[number].data.tags[NOTE] for number in (5, 6))
    back = f"[fish]({here}{parent.info.run_id}?{TRAINING})"
    assert of_best.startswith(f"**The best of its study.** Trial 5 of {back}: complete, eval_loss 0.01")
    assert "bilora-ray export fish --trial 5 " in of_best
    assert "loss is nan | at step 5" in of_failed
    assert "Adapter" not in of_failed


def test_a_study_that_was_stopped_says_how_far_it_is(project: Project) -> None:
    project.open().close([record(0, steps=1)], None, interrupted=True)
    assert project.parent().data.tags[NOTE] == "No trial is complete yet.\n\n1 trial: 1 running."


def test_the_report_is_among_the_artifacts_once_it_is_there(project: Project, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = [record(0, Status.COMPLETE, steps=3, value=0.01)]
    project.open(report=report).close(done, 0, interrupted=False)
    run_id = project.parent().info.run_id
    assert project.client.list_artifacts(run_id) == []
    report.write_text("<p>first</p>")
    project.open(report=report).close(done, 0, interrupted=False)
    assert [file.path for file in project.client.list_artifacts(run_id)] == ["report.html"]
    assert f"`{report}`" in project.parent().data.tags[NOTE]


def test_the_experiment_offers_a_view_of_the_study_with_the_best_first(project: Project) -> None:
    for _ in range(2):
        project.open(objectives=(MATCH,), searched=("rank", "rho"))
    experiment = project.client.get_experiment_by_name(project.name)
    assert experiment is not None
    (view,) = (value for key, value in experiment.tags.items() if key.startswith(VIEW))
    told = json.loads(view)
    state = json.loads(told["state"])
    assert told["name"] == "fish"
    assert state["orderByKey"] == state["selectedColumns"][0] == "metrics.`best_eval_exact_match`"
    assert state["orderByAsc"] is False
    assert state["selectedColumns"][1:3] == ["params.`rank`", "params.`rho`"]
    found = project.client.search_runs([experiment.experiment_id], state["searchFilter"])
    assert len(found) == len(project.trials()) == 0
    assert json.loads(json.loads(view_of("s", "id", Objective("eval_loss", False), (), 1))["state"])["orderByAsc"]


def test_an_old_run_keeps_its_name_and_its_metrics(project: Project) -> None:
    tracker = project.open()
    tags = {"mlflow.parentRunId": project.parent().info.run_id, "bilora_ray.trial": "3"}
    old = project.client.create_run(project.parent().info.experiment_id, tags=tags, run_name="fish-0003")
    project.client.log_metric(old.info.run_id, "max_steps", 30, step=10)
    tracker = project.open()
    tracker.close([record(3, Status.COMPLETE, steps=3, value=0.01)], 3, interrupted=False)
    run = project.trials()[3]
    assert (run.info.run_id, run.info.run_name) == (old.info.run_id, "fish-0003")
    assert run.data.metrics["max_steps"] == 30
    assert run.data.metrics["best_eval_loss"] == 0.01


def test_what_finalists_say_is_the_first_paragraph_and_a_newer_one_takes_its_place() -> None:
    note = "**Best: trial 1**\n\nand more"
    first = with_winner(note, "of the finalists: trial 1**")
    assert first == "**Winner of the finalists: trial 1**\n\n" + note
    assert with_winner(first, "of the finalists: trial 2**") == "**Winner of the finalists: trial 2**\n\n" + note


def test_a_baseline_is_told_where_it_is_known() -> None:
    known = {"kind": "base-model", "eval_exact_match": 0.2625}
    line = "To compare with: the base model alone has eval_exact_match 0.2625"
    assert baseline_line(known, "eval_exact_match") == line
    assert baseline_line(known, "eval_loss") is None
    assert baseline_line({}, "eval_loss") is None
