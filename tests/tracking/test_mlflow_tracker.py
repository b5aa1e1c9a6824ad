"""What the tracker writes into a SQLite store."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import Run

from bilora_ray import __version__
from bilora_ray.records import Parent, Status

from .tracked import SETTINGS, STUDY, Project, evaluation, record

ENDS = [
    (Status.COMPLETE, "FINISHED", "complete"),
    (Status.PRUNED, "FINISHED", "pruned"),
    (Status.FAILED, "FAILED", "failed"),
]


def test_modules_import_without_mlflow() -> None:
    code = "import sys, bilora_ray.tracking.mlflow_tracker; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_open_makes_one_parent_run_and_finds_it_again(project: Project) -> None:
    project.open()
    first = project.parent()
    project.open()
    assert project.parent().info.run_id == first.info.run_id
    assert first.info.run_name == STUDY
    assert first.info.status == "RUNNING"
    assert first.data.params == {"model_name_or_path": "builtin:tiny", "max_steps": "30"}


def test_trials_of_which_none_is_the_best_end_their_study_as_well(project: Project) -> None:
    project.open().close([record(0, Status.COMPLETE, steps=1)], None, interrupted=False)
    parent = project.parent()
    assert parent.info.status == "FINISHED"
    assert "No trial is complete" not in parent.data.tags["mlflow.note.content"]


def test_study_tags_keep_studies_of_one_name_apart(project: Project) -> None:
    mine, other = ({"bilora_ray.study_id": name} for name in ("mine", "other"))
    for tags in (mine, other, mine):
        project.open(tags=tags).trial_started(record())
    assert len(project.runs()) == 4


def test_runs_say_what_made_them(project: Project) -> None:
    project.open().close([record(0, Status.PRUNED, steps=1)], None, interrupted=False)
    for run in project.runs():
        assert list(run.data.tags)[-1].startswith("bilora_ray.version.")
        assert run.data.tags["bilora_ray.version.bilora-ray"] == __version__
        assert run.data.tags["bilora_ray.version.mlflow"].startswith("3.")


def test_commit_is_that_of_the_current_folder(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    project.open()
    assert "mlflow.source.git.commit" not in project.parent().data.tags
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", *author, "commit", "--quiet", "--allow-empty", "--message", "x"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    project.open(tags={"second": "yes"})
    commits = [run.data.tags.get("mlflow.source.git.commit") for run in project.runs()]
    assert sorted(map(str, commits)) == sorted(["None", head.strip()])


def test_data_are_inputs_of_every_run_once(project: Project) -> None:
    digests = {"/data/train.jsonl": "d" * 64, "builtin:fish": "ab12", "nyu-mll/glue": "cd34"}
    for _ in range(2):
        project.open(digests=digests).trial_started(record())
    assert len(project.runs()) == 2
    for run in project.runs():
        data = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
        assert len(data) == len(run.inputs.dataset_inputs) == 3
        assert data["train.jsonl"].digest == "d" * 36
        assert (data["train.jsonl"].source_type, json.loads(data["train.jsonl"].source)) == (
            "local",
            {"uri": "/data/train.jsonl"},
        )
        assert data["glue"].source_type == "hugging_face"
        assert data["builtin:fish"].digest == "ab12"


def test_a_trial_that_goes_on_from_another_s_checkpoint_says_so(project: Project) -> None:
    tracker = project.open()
    tracker.trial_started(record(7))
    tracker.trial_started(record(8, parent=Parent(number=7, step=20, rung=2, seconds=3.0, replaces=5)))
    tags = [project.trials()[number].data.tags for number in (7, 8)]
    assert "bilora_ray.parent_trial" not in tags[0]
    assert (tags[1]["bilora_ray.parent_trial"], tags[1]["bilora_ray.parent_step"]) == ("7", "20")


def test_started_trial_is_a_child_with_its_settings(project: Project) -> None:
    settings = {**SETTINGS, "target_modules": ("q_proj", "v_proj"), "gradient_checkpointing": False}
    project.open().trial_started(record(7, settings=settings))
    run = project.trials()[7]
    assert run.info.run_name == "trial 7: rho 0.05"
    assert run.info.status == "RUNNING"
    assert run.data.tags["bilora_ray.status"] == "running"
    assert json.loads(run.data.tags["bilora_ray.sampled"]) == {"rho": 0.05}
    assert run.data.params == {
        "metric": "eval_loss",
        "method": "bilora",
        "rank": "8",
        "rho": "0.05",
        "lora_alpha": "null",
        "target_modules": '["q_proj", "v_proj"]',
        "gradient_checkpointing": "false",
    }


def test_long_texts_are_cut_and_many_params_are_sent(project: Project) -> None:
    settings = {**SETTINGS, "prompt_template": "x" * 7000, **{f"setting_{number}": number for number in range(150)}}
    tracker = project.open()
    tracker.trial_started(record(settings=settings))
    tracker.trial_ended(record(status=Status.FAILED, error="y" * 9000, settings=settings))
    run = project.trials()[0]
    assert run.data.params["prompt_template"] == "x" * 5999 + "…"
    assert run.data.tags["bilora_ray.error"] == "y" * 4999 + "…"
    assert len(run.data.params) == len(settings)
    assert project.said == []


def test_only_finite_numbers_are_logged(project: Project) -> None:
    tracker = project.open()
    metrics = {**evaluation(10), "nan": math.nan, "infinite": math.inf, "text": "no number", "absent": None}
    tracker.trial_reported(record(), metrics)  # type: ignore[arg-type]
    tracker.trial_reported(record(), {**evaluation(20), "nan": 0.5})
    assert project.steps(0) == [(10, 1 / 10), (20, 1 / 20)]
    assert project.steps(0, "nan") == [(20, 0.5)]
    assert set(project.trials()[0].data.metrics) == {"best_eval_loss", "eval_loss", "nan"}
    assert project.said == []


def test_replayed_evaluations_are_logged_once(project: Project) -> None:
    tracker = project.open()
    for step in (10, 20, 10):
        tracker.trial_reported(record(), evaluation(step))
    resumed = project.open()
    resumed.trial_started(record(steps=1))
    for step in (10, 20, 30):
        resumed.trial_reported(record(steps=1), evaluation(step))
    assert project.steps(0) == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]


@pytest.mark.parametrize(("status", "mlflow_status", "tag"), ENDS)
def test_ended_trial_has_its_status(project: Project, status: Status, mlflow_status: str, tag: str) -> None:
    tracker = project.open()
    tracker.trial_started(record())
    tracker.trial_ended(record(status=status, error="loss is nan at step 5" if tag == "failed" else None))
    run = project.trials()[0]
    assert (run.info.status, run.data.tags["bilora_ray.status"]) == (mlflow_status, tag)
    assert run.data.tags.get("bilora_ray.error") == ("loss is nan at step 5" if tag == "failed" else None)
    assert run.info.end_time is not None


def test_complete_trial_has_its_value_and_adapter(project: Project, adapter: Path) -> None:
    tracker = project.open()
    tracker.trial_started(record())
    tracker.trial_ended(record(status=Status.COMPLETE, steps=3, value=0.01, adapter=adapter))
    assert project.steps(0, "best_eval_loss")[-1] == (30, 0.01)
    assert project.artifacts(0) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_a_whole_model_of_each_trial_is_not_sent(project: Project, adapter: Path) -> None:
    tracker = project.open()
    settings = {**record().settings, "method": "full"}
    tracker.trial_started(record(settings=settings))
    tracker.trial_ended(record(status=Status.COMPLETE, steps=3, value=0.01, adapter=adapter, settings=settings))
    assert project.steps(0, "best_eval_loss")[-1] == (30, 0.01)
    assert project.artifacts(0) == []


def test_interrupted_trial_is_reopened_by_a_resume(project: Project) -> None:
    running = record(steps=1)
    tracker = project.open()
    tracker.trial_started(running)
    tracker.close([running], None, interrupted=True)
    run = project.trials()[0]
    assert (run.info.status, run.data.tags["bilora_ray.status"]) == ("KILLED", "interrupted")
    assert (project.parent().info.status, project.parent().data.tags["bilora_ray.status"]) == ("KILLED", "interrupted")

    resumed = project.open()
    assert project.parent().info.status == "RUNNING"
    resumed.reconcile([running])
    assert project.trials()[0].info.run_id == run.info.run_id
    assert project.trials()[0].info.status == "RUNNING"
    assert project.trials()[0].data.tags["bilora_ray.status"] == "running"
    assert project.steps(0) == [(10, 1 / 10)]


def _child(project: Project, number: int) -> Run:
    tags = {"mlflow.parentRunId": project.parent().info.run_id, "bilora_ray.trial": str(number)}
    return project.client.create_run(project.parent().info.experiment_id, tags=tags, run_name="half-made")


def test_run_that_a_kill_left_empty_is_filled(project: Project) -> None:
    project.open()
    run = _child(project, 3)
    project.open().reconcile([record(3, steps=2)])
    assert project.trials()[3].info.run_id == run.info.run_id
    assert project.trials()[3].data.params["rho"] == "0.05"
    assert len(project.steps(3)) == 2


def test_of_two_runs_of_a_trial_the_older_stays(project: Project) -> None:
    project.open().trial_started(record(3))
    older = project.trials()[3]
    newer = _child(project, 3)
    project.open().reconcile([record(3, steps=1)])
    assert project.trials()[3].info.run_id == older.info.run_id
    assert project.client.get_run(newer.info.run_id).info.lifecycle_stage == "deleted"


def test_runs_that_a_person_made_are_left_alone(project: Project) -> None:
    tracker = project.open()
    tags = {"mlflow.parentRunId": project.parent().info.run_id}
    own = project.client.create_run(project.parent().info.experiment_id, tags=tags)
    project.open().reconcile([record()])
    tracker.close([record()], None, interrupted=False)
    assert project.client.get_run(own.info.run_id).info.status == "RUNNING"


def test_close_makes_mlflow_agree_with_records_it_never_saw(project: Project, adapter: Path) -> None:
    records = [
        record(0, Status.COMPLETE, steps=3, value=0.02, adapter=adapter),
        record(1, Status.COMPLETE, steps=3, value=0.01, sampled={"rho": 0.2}, adapter=adapter),
        record(2, Status.PRUNED, steps=1),
        record(3, Status.FAILED, error="out of memory"),
        record(4, steps=2),
    ]
    project.open().close(records, best_number=1, interrupted=False)
    trials, parent = project.trials(), project.parent()
    statuses = [trials[number].data.tags["bilora_ray.status"] for number in range(5)]
    assert statuses == ["complete", "complete", "pruned", "failed", "interrupted"]
    assert [len(project.steps(number)) for number in range(5)] == [3, 3, 1, 0, 2]
    assert len(project.artifacts(0)) == len(project.artifacts(1)) == 2
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"best_eval_loss": 0.01}
    assert parent.data.tags["bilora_ray.best_trial"] == "1"
    assert parent.data.tags["bilora_ray.best_run_id"] == trials[1].info.run_id
    assert json.loads(parent.data.tags["bilora_ray.best_sampled"]) == {"rho": 0.2}
    assert [number for number in trials if "bilora_ray.best" in trials[number].data.tags] == [1]


@pytest.mark.parametrize("resumed", [False, True])
def test_an_evaluation_after_the_stop_is_sent_when_the_study_is_closed(project: Project, resumed: bool) -> None:
    tracker = project.open()
    tracker.trial_started(record())
    tracker.trial_ended(record(0, Status.PRUNED, steps=2, value=0.05))
    assert len(project.steps(0)) == 2
    tracker = project.open() if resumed else tracker
    tracker.close([record(0, Status.PRUNED, steps=3, value=1 / 30)], None, interrupted=False)
    assert project.steps(0) == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    assert project.trials()[0].data.metrics["best_eval_loss"] == 1 / 30
    assert project.trials()[0].info.status == "FINISHED"


def test_a_study_without_a_complete_trial_has_failed(project: Project) -> None:
    project.open().close([record(0, Status.FAILED, error="out of memory")], None, interrupted=False)
    parent = project.parent()
    assert (parent.info.status, parent.data.tags["bilora_ray.status"]) == ("FAILED", "failed")


def test_best_mark_moves_when_a_resumed_study_finds_a_better_trial(project: Project) -> None:
    first = record(0, Status.COMPLETE, steps=3, value=0.02)
    second = record(1, Status.COMPLETE, steps=3, value=0.01)
    project.open().close([first], 0, interrupted=False)
    for _ in range(2):
        project.open().close([first, second], 1, interrupted=False)
    marked = [number for number, run in project.trials().items() if "bilora_ray.best" in run.data.tags]
    assert marked == [1]
    history = project.client.get_metric_history(project.parent().info.run_id, "best_eval_loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.02), (2, 0.01)]


def test_trials_that_mlflow_holds_are_not_written_again(
    project: Project, adapter: Path, counted: dict[str, int]
) -> None:
    records = [record(number, Status.COMPLETE, steps=3, value=0.01, adapter=adapter) for number in range(3)]
    project.open().reconcile(records)
    assert counted["log_artifacts"] == 3
    tracker = project.open()
    counted.clear()
    tracker.reconcile(records)
    assert counted == {}


def test_the_front_is_marked_with_its_values_and_the_mark_goes_where_another_takes_its_place(project: Project) -> None:
    quick = record(0, Status.COMPLETE, steps=3, value=0.02, values={"eval_loss": 0.02, "train_runtime": 5.0})
    good = record(1, Status.COMPLETE, steps=3, value=0.01, values={"eval_loss": 0.01, "train_runtime": 9.0})
    large = record(2, Status.PRUNED, steps=1, broken="max_adapter_mb: adapter_mb is 4, 2 is allowed")
    project.open().close([quick], 0, interrupted=True, front=[0])
    project.open().close([quick, good, large], 1, interrupted=False, front=[1])
    marks = {number: run.data.tags.get("bilora_ray.pareto_front") for number, run in project.trials().items()}
    assert marks == {0: None, 1: "true", 2: None}
    assert project.parent().data.tags["bilora_ray.pareto_front"] == "[1]"
    assert project.trials()[1].data.metrics["best_train_runtime"] == 9.0
    assert project.trials()[2].data.tags["bilora_ray.broken"].startswith("max_adapter_mb")
