"""A search that is steered from another terminal, through the study database, and one that its failures end."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from chaos.searches import Search, kill_searches
from click.testing import CliRunner, Result
from optuna.trial import TrialState
from postgresql import server
from tiny_trials import Tiny, next_trial

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.records import Status
from bilora_ray.runners.task import BY_SETTINGS, FAILURE, NUMBER, TRIALS
from bilora_ray.search.session import Observers
from bilora_ray.search.simulated import simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.causes import IN_A_ROW, cause_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.steering.requests import checked
from bilora_ray.search.study.storage import running_study
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.tuning import Steered, StudyScheduler

TRIAL = (
    "model_name_or_path=org/model",
    "task=causal-lm",
    "train_data=org/data",
    "method={choice: [lora, bilora]}",
    "rho={low: 0.01, high: 0.2, log: true}",
    "rank={choice: [4, 8, 16]}",
)


def opened(path: Path, *study: str) -> SearchStudy:
    given = ("study.name=s", "study.scheduler=none", "study.num_trials=4", *study)
    return open_study(load_space(None, [*TRIAL, *given]), Layout(path / "runs"), {})


def typed(path: Path, *words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, [*words, "--storage-path", str(path / "runs")], input=answer)


def said(path: Path, *words: str) -> str:
    result = typed(path, *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def told(step: int, of: int = 3, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "max_steps": of, "eval_loss": loss}


# enqueue


def test_what_is_asked_for_is_tried_next_in_its_order_while_a_search_runs(tmp_path: Path) -> None:
    study = opened(tmp_path)
    assert next_trial(study) == 0
    assert (
        said(tmp_path, "enqueue", "s", "rank=16", "method=bilora", "rho=0.1") == "Study 's': trial 1 is the next one.\n"
    )
    after = json.loads(said(tmp_path, "enqueue", "s", "rank=4", "--json"))
    assert after == {"study": "s", "trial": 2, "settings": {"rank": 4}, "after": [1]}
    study.release()
    study = opened(tmp_path)  # and a resume knows it too
    assert [next_trial(study) for _ in range(4)] == [0, 1, 2, 3]
    assert study.record(1).sampled == {"method": "bilora", "rho": 0.1, "rank": 16}
    assert study.record(2).sampled["rank"] == 4
    assert "--extend 1" in said(tmp_path, "enqueue", "s", "rank=4")


def test_of_a_study_that_is_made_anew_nothing_is_asked(tmp_path: Path) -> None:
    opened(tmp_path).release()  # whose search died before its first trial
    result = typed(tmp_path, "enqueue", "s", "rank=4")
    assert (result.exit_code, "study 's': no trial of it has begun" in result.stderr) == (2, True)
    assert load_study(Layout(tmp_path / "runs"), "s").study.trials == []


def test_what_is_asked_of_a_study_that_a_budget_ended_waits_for_another_one(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.target=1", "study.num_trials=2")
    next_trial(study)
    study.report(0, told(1))
    study.release()
    line = "The study ended by target: eval_loss 1 is as good as 1. With another target, or without one, "
    assert said(tmp_path, "enqueue", "s", "rank=4").endswith(f"\n{line}--resume begins the trial.\n")
    assert said(tmp_path, "enqueue", "s", "rank=4").endswith(f"\n{line}--extend 1 begins the trial.\n")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["rnak=8"], "unknown key 'rnak'; did you mean 'rank'?"),
        (["rank=5"], "rank 5 is outside its distribution, one of 4, 8, 16"),
        (["rho=0.5", "method=bilora"], "rho 0.5 is outside its distribution, 0.01 to 0.2, on a log scale"),
        (["rho=0.1", "method=lora"], "rho has no effect where method is lora"),
        (["rho=0.1"], "rho has no effect where method is lora; name method too"),
        (["learning_rate=0.001"], "learning_rate is not searched"),
        (["task=causal-lm"], "task is 'causal-lm' for all trials of it"),
        (["study.seed=1"], "only a trial's settings"),
        (["rank=4", "rank=8"], "'rank' is given twice"),
        (["rank"], "rank: must be key=value"),
    ],
)
def test_what_the_space_could_not_have_drawn_is_refused(settings: list[str], line: str, tmp_path: Path) -> None:
    opened(tmp_path)
    result = typed(tmp_path, "enqueue", "s", *settings)
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert load_study(Layout(tmp_path / "runs"), "s").study.trials == []


CASES = (
    "method={choice: [lora, bilora]}",
    "learning_rate=[{low: 1e-3, high: 1e-2, when: {method: lora}}, {low: 1e-4, high: 2e-3, when: {method: bilora}}]",
    "lora_alpha=2 * rank",
    "rank={choice: [4, 8]}",
)


def test_a_setting_that_has_a_range_in_each_case_is_asked_for_in_its_own(tmp_path: Path) -> None:
    space = load_space(None, [*TRIAL[:3], *CASES, "study.name=s"])
    assert checked(space, {"method": "lora", "learning_rate": 0.005}) == {
        "method": "lora",
        "learning_rate@method=lora": 0.005,
    }
    # It is in both.
    assert len(checked(space, {"learning_rate": 0.0015})) == 2
    with pytest.raises(UserError, match=r"learning_rate 0\.005 is outside its distribution, 0\.0001 to 0\.002"):
        checked(space, {"learning_rate": 0.005})


def test_a_clone_has_the_cases_and_the_derived_settings_too(tmp_path: Path) -> None:
    given = [*TRIAL[:3], *CASES, "study.name=s", "study.objectives=[{metric: eval_loss}, {metric: train_runtime}]"]
    open_study(load_space(None, given), Layout(tmp_path / "runs"), {})
    file = tmp_path / "new.yaml"
    said(tmp_path, "clone", "s", "new", "--output", str(file))
    before, after = load_study(Layout(tmp_path / "runs"), "s").space, load_space(file)
    assert (after.distributions, after.given, after.fixed) == (before.distributions, before.given, before.fixed)
    assert after.objectives == before.objectives


# stop


def test_a_trial_that_is_stopped_ends_at_its_next_evaluation_and_counts(tmp_path: Path) -> None:
    study = opened(tmp_path)
    next_trial(study), next_trial(study)
    assert study.report(0, told(1, loss=0.5)) is Status.RUNNING
    said(tmp_path, "stop", "s", "--trial", "0")
    study.release()
    study = opened(tmp_path)  # killed before it heard of it
    assert [next_trial(study), next_trial(study)] == [0, 1]
    assert study.report(1, told(1)) is Status.RUNNING
    assert study.report(0, told(2, loss=0.7)) is Status.COMPLETE
    assert (study.record(0).value, study.best()) == (0.5, study.record(0))
    result = typed(tmp_path, "stop", "s", "--trial", "0")
    assert (result.exit_code, result.stderr) == (2, "Error: study 's': trial 0 has ended already (complete)\n")


def test_no_scheduler_has_a_say_of_a_trial_that_was_asked_to_stop(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.scheduler=asha", "study.grace_period=1", "study.reduction_factor=2")
    next_trial(study), next_trial(study)
    assert study.report(0, told(1, loss=0.5)) is Status.RUNNING
    said(tmp_path, "stop", "s", "--trial", "1")
    assert study.report(1, told(1, loss=0.9)) is Status.COMPLETE  # the weaker of two
    record = study.record(1)
    rows = record.settings["per_device_train_batch_size"]
    assert (record.ended_by, record.stopped_after) == ("stop", {"rows": rows})
    shown = json.loads(said(tmp_path, "show", "s", "--json"))["trials"][1]
    assert (shown["status"], shown["ended_by"], shown["stopped_after"]) == ("complete", "stop", {"rows": rows})
    lines = said(tmp_path, "show", "s").splitlines()
    assert f"Ended by stop: 1, after {rows} rows" in lines
    assert any("ended by stop" in line and "0.9" in line for line in lines)


def test_workers_that_have_not_heard_of_the_end_leave_nothing_behind_and_are_judged_by_what_stays(
    tmp_path: Path,
) -> None:
    study = opened(tmp_path, "study.target=0.5")
    number = next_trial(study)
    assert number == 0
    assert study.report(0, told(1, loss=0.5)) is Status.COMPLETE
    folder = study.folder(0)
    late = folder.checkpoint_at(2)
    late.mkdir(parents=True)
    state = {"step": 2, "best_step": 2, "history": [told(1, loss=0.5), told(2, loss=0.4)]}
    (late / "state.json").write_text(json.dumps(state))
    (late / "tensors.safetensors").write_bytes(bytes(100))
    study.settle()
    assert [path.name for path in late.iterdir()] == ["state.json"]
    record = study.record(0)
    assert (record.ended_by, record.value, record.adapter) == ("target", 0.4, folder.adapter_at(2))


def test_what_a_complete_trial_leaves_as_its_search_is_killed_goes_with_the_next_one(tmp_path: Path) -> None:
    study = opened(tmp_path)
    next_trial(study)
    assert study.report(0, told(3)) is Status.COMPLETE
    study.release()
    tensors = study.folder(0).checkpoint_at(3) / "tensors.safetensors"
    tensors.parent.mkdir(parents=True)  # it died before it removed them
    tensors.write_bytes(bytes(100))
    opened(tmp_path).release()
    assert not tensors.exists()


def test_the_end_by_a_budget_that_a_kill_left_untold_is_none_where_the_budget_has_grown(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.target=0.5")
    assert next_trial(study) == 0
    tell, study.study.tell = study.study.tell, None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        study.report(0, told(1, loss=0.5))
    study.study.tell = tell  # type: ignore[method-assign]
    study.release()
    again = opened(tmp_path, "study.target=0.1")
    assert next_trial(again) == 0
    assert [again.report(0, told(step, loss=0.5)) for step in (1, 2, 3)] == [*[Status.RUNNING] * 2, Status.COMPLETE]
    assert (again.record(0).ended_by, again.record(0).stopped_after) == (None, {})


def test_a_search_that_is_stopped_hears_of_it_though_no_trial_reports(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "runs")
    with running_study(layout, "s"):
        study = opened(tmp_path)
        next_trial(study)
        asked = Steered(study)
        asked._ask_at = 0.0
        assert not asked.stop_all()
        from bilora_ray.search.study.steering import requests

        requests.stop_study(load_to_write(layout).study)
        asked._ask_at = 0.0
        assert asked.stop_all()
        study.release()
        # Who resumes it has heard of it.
        again = opened(tmp_path)
        assert not again.asked_to_stop()
        assert next_trial(again) == 0
    result = typed(tmp_path, "stop", "s")
    assert (result.exit_code, result.stderr) == (2, "Error: study 's': no process runs it\n")


def load_to_write(layout: Layout) -> Any:
    from bilora_ray.search.study.studies import steered_study

    return steered_study(layout, "s")


def test_the_time_of_a_search_ends_it_though_no_trial_reports(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.max_hours=1")
    study.budget.clock = lambda: 0.0
    next_trial(study)
    study.budget.clock = lambda: 3600.0
    assert not study.asked_to_stop()
    assert load_study(Layout(tmp_path / "runs"), "s").end() is not None
    assert study.report(0, told(1)) is Status.COMPLETE


def test_a_trial_that_died_as_it_was_failed_and_was_run_again_is_no_failure(tmp_path: Path) -> None:
    study = opened(tmp_path, f"study.num_trials={IN_A_ROW}")
    for number in range(IN_A_ROW):
        assert next_trial(study) == number
        study._live[number].set_user_attr("error", "diverged")
        if number:
            study.fail(number, "diverged", by_settings=False)
        else:
            study.report(number, told(3))
    assert study.common_cause() is None


# delete


def test_a_study_is_deleted_only_if_that_is_meant_and_nobody_runs_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "runs")
    study = opened(tmp_path)
    next_trial(study)
    (study.folder(0).path / "tensors").write_bytes(b"0" * 5000)
    study.release()
    with running_study(layout, "s"):
        result = typed(tmp_path, "delete", "s", "--yes")
    assert (result.exit_code, "is being searched by another process" in result.stderr) == (2, True)
    result = typed(tmp_path, "delete", "s", answer="n\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert load_study(layout, "s").records()
    gone = json.loads(said(tmp_path, "delete", "s", "--yes", "--json"))
    assert gone["freed_bytes"] >= 5000
    assert not layout.study("s").exists()
    assert said(tmp_path, "show", "--json") == "[]\n"
    opened(tmp_path)  # its name is free


@pytest.mark.slow
def test_the_runs_of_a_study_go_with_it_and_those_of_others_stay(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from bilora_ray.search.session import artifacts_of, study_info
    from bilora_ray.tracking.mlflow_tracker import MlflowTracker, default_uri

    layout, ids = Layout(tmp_path / "runs"), {}
    for name in ("s", "other"):
        study = opened(tmp_path, f"study.name={name}")
        next_trial(study)
        study.report(0, told(3))
        adapter = study.folder(0).adapter_at(3)
        adapter.mkdir(parents=True)
        (adapter / "weights").write_bytes(b"0" * 9000)
        checkpoint = study.folder(0).checkpoint_at(3)
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": 3, "best_step": 3, "history": [told(3)]}))
        uri, info = default_uri(layout.storage_path), study_info(study, {})
        tracker = MlflowTracker.open(uri, "bilora-ray", artifacts_of(layout), info, print)
        tracker.close(study.records(), 0, interrupted=True)
        study.release()
        ids[name] = study.id
    gone = json.loads(said(tmp_path, "delete", "s", "--yes", "--json"))
    assert gone["runs"] == 2
    assert gone["freed_bytes"] >= 18000  # the adapter and its copy in MLflow
    client = MlflowClient(default_uri(layout.storage_path))
    (experiment,) = client.search_experiments(filter_string="name = 'bilora-ray'")
    left = client.search_runs([experiment.experiment_id], run_view_type=3)
    assert len(left) == 2
    assert {run.data.tags.get("bilora_ray.study", "other") for run in left} == {"other"}


# clone


def test_a_clone_is_a_space_file_that_searches_the_same_but_for_what_is_set(tmp_path: Path) -> None:
    opened(tmp_path, "study.points_to_evaluate=[{rank: 8}, {rho: 0.1, rank: 4}]", "study.max_hours=2")
    file = tmp_path / "new.yaml"
    said(tmp_path, "clone", "s", "new", "--set", "rank={choice: [4, 32]}", "--output", str(file))
    before, after = load_study(Layout(tmp_path / "runs"), "s").space, load_space(file)
    assert after.points_to_evaluate == ({"rho": 0.1, "rank": 4},)
    assert after.study.model_copy(update={"points_to_evaluate": ()}) == before.study.model_copy(
        update={"name": "new", "points_to_evaluate": ()}
    )
    assert after.fixed == before.fixed
    assert after.distributions["rho"] == before.distributions["rho"]
    assert after.distributions["rank"].ends() == (4, 32)
    assert "name: new" in file.read_text()
    again = typed(tmp_path, "clone", "s", "new", "--output", str(file))
    assert (again.exit_code, again.stderr) == (2, f"Error: --output {file}: exists; name another file\n")
    assert "resources" not in yaml.safe_load(file.read_text())


def test_a_clone_has_no_name_that_a_study_has(tmp_path: Path) -> None:
    opened(tmp_path)
    file = tmp_path / "s.yaml"
    done = typed(tmp_path, "clone", "s", "s", "--output", str(file))
    assert (done.exit_code, done.stderr) == (2, "Error: NEW: a study 's' exists; give this one another name\n")
    assert not file.exists()


@pytest.mark.parametrize("verb", [["enqueue", "t", "rank=4"], ["stop", "t"], ["delete", "t"], ["clone", "t", "u"]])
def test_a_study_that_is_not_there_is_told_with_the_nearest(verb: list[str], tmp_path: Path) -> None:
    opened(tmp_path, "study.name=tt")
    result = typed(tmp_path, *verb)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "did you mean 'tt'?" in result.stderr


# extend


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--extend", "2", "--num-trials", "9"], "--extend: says how many trials more"),
        (["--extend", "2", "--set", "study.num_trials=9"], "--extend: says how many trials more"),
        (["--extend", "0"], "--extend"),
    ],
)
def test_an_extension_beside_a_number_of_trials_is_refused(words: list[str], line: str, tmp_path: Path) -> None:
    space = Path(__file__).resolve().parents[2] / "search_spaces" / "quickstart.yaml"
    result = typed(tmp_path, "tune", "--space", str(space), *words)
    assert result.exit_code == 2
    assert line in result.stderr


def test_an_extension_is_of_what_the_study_was_asked_for(tmp_path: Path) -> None:
    from bilora_ray.library.searching import not_shrunk

    study = opened(tmp_path, "study.num_trials=6")
    small = load_space(None, [*TRIAL, "study.name=s", "study.num_trials=3"])
    assert not_shrunk(small, study.layout, None).study.num_trials == 6
    assert not_shrunk(small, study.layout, 5).study.num_trials == 11
    unbegun = load_space(None, [*TRIAL, "study.name=t", "study.num_trials=3"])
    assert not_shrunk(unbegun, study.layout, 5).study.num_trials == 3  # of which the search says that it is not there
    study.release()
    ended = opened(tmp_path, "study.num_trials=6", "study.target=1")
    next_trial(ended)
    ended.report(0, told(1))
    with pytest.raises(
        UserError, match="study 's' ended by target: eval_loss 1 is as good as 1; give it another target"
    ):
        not_shrunk(ended.space, study.layout, 5)
    assert not_shrunk(small, study.layout, 5).study.num_trials == 11


# failures


class Controller:
    """What the scheduler asks of Tune's."""

    stopped = False

    def request_stop_experiment(self) -> None:
        self.stopped = True


def failing(study: SearchStudy, lines: list[str], by_settings: bool = False) -> tuple[Controller, StudyScheduler]:
    controller, scheduler = Controller(), StudyScheduler(study, Observers([]))
    for line in lines:
        number = next_trial(study)
        assert number is not None
        tune_trial: Any = SimpleNamespace(config={TRIALS: [{NUMBER: number}]}, num_failures=0, error_file=None)
        if line == "works":
            study.report(number, told(3))
        else:
            result = {NUMBER: number, FAILURE: line, BY_SETTINGS: by_settings}
            scheduler.on_trial_result(controller, tune_trial, result)
    return controller, scheduler


@pytest.mark.parametrize("by_settings", [True, False])
def test_five_failures_of_one_cause_in_a_row_halt_the_search(by_settings: bool, tmp_path: Path) -> None:
    study = opened(tmp_path, "study.num_trials=20")
    lines = [f"loss is {'nan' if step % 2 else 'inf'} at step {step}" for step in range(IN_A_ROW)]
    controller, scheduler = failing(study, lines, by_settings)
    assert controller.stopped
    assert isinstance(scheduler.halted, MachineError)  # so that the study stays, to be resumed
    cause = "5 trials in a row failed, the last one (4) by this: loss is inf at step 4"
    assert str(scheduler.halted) == f"{cause}; mend that and go on with --resume"
    study.release()
    # Who resumes it has looked: it counts anew.
    again = opened(tmp_path, "study.num_trials=20")
    assert not failing(again, lines[:-1], by_settings)[0].stopped
    again.release()
    assert failing(opened(tmp_path, "study.num_trials=20"), lines[:1], by_settings)[0].stopped


def test_failures_of_many_causes_and_one_that_works_in_between_halt_nothing(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.num_trials=20")
    lines = ["loss is nan at step 3"] * 4 + ["works"] + ["loss is nan at step 3"] * 4 + ["out of memory"] * 4
    controller, scheduler = failing(study, lines)
    assert not controller.stopped
    assert scheduler.halted is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("loss is nan at step 3", "loss is inf at step 120", True),
        ("out of memory: 2.50 GiB of 80 GiB", "out of memory: 13.1 GiB of 80 GiB", True),
        ("actor 3fa9c1d2e0 on 10.0.0.3 died", "actor 07bb41c9aa on 10.0.0.17 died", True),
        ("/runs/s/trials/0001: no space left", "/runs/s/trials/0002: no space left", True),
        ("out of memory", "loss is nan", False),
        ("KeyError: 'a'", "KeyError: 'b'", False),
        ("defaced", "accede", False),
    ],
)
def test_one_cause_is_told_by_lines_that_differ_in_their_numbers(one: str, other: str, same: bool) -> None:
    assert (cause_of(one) == cause_of(other)) is same


def curve(config: TrialConfig) -> list[dict[str, float]]:
    return [{**told(step, loss=1 / step), "train_runtime": float(step)} for step in (1, 2, 3)]


def test_reads_of_a_report_do_not_grow_with_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    statements: list[str] = []
    counts = []
    budgets = ("study.max_hours=9", "study.max_device_hours=9", "study.target=0.1")
    study = opened(tmp_path, *budgets, "study.sampler=random", "study.num_trials=24")

    study.budget.clock = lambda: 0.0  # or the study would be told how long it runs, now and then

    def count(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", count)
    try:
        while (number := next_trial(study)) is not None:
            for metrics in curve(study.config(number))[:2]:
                statements.clear()
                study.report(number, metrics)
            counts.append(len(statements))
            study.report(number, curve(study.config(number))[2])
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    assert counts[3] == counts[23]
    assert {trial.state for trial in study.study.trials} == {TrialState.COMPLETE}
    assert simulate(study, curve) == []


@pytest.mark.slow
def test_a_search_that_runs_is_steered_stopped_and_ended_by_its_time(tmp_path: Path, tiny: Tiny) -> None:
    search = Search(tmp_path, tiny, num_trials=3, max_steps=20_000)
    try:
        process = search.start("--max-concurrent=1")
        # Who looks before the tables are made would make them too.
        search.wait(process, lambda: search.trial(0).path.is_dir() and search.reports() > 0)
        assert "trial 1 is the next one" in said(tmp_path, "enqueue", "s", "learning_rate=0.002")
        said(tmp_path, "stop", "s", "--trial", "0")
        search.wait(process, lambda: 1 in search.in_flight())
        assert "Go on:" in said(tmp_path, "stop", "s")
        assert search.ends(process) == 130
        states = [trial.state for trial in search.trials()]
        assert states == [TrialState.COMPLETE, TrialState.RUNNING]
        assert search.trials()[1].params["learning_rate"] == 0.002

        # It goes on with the trial, whose next evaluation is its last: the time is over.
        assert search.ends(search.start("--max-concurrent=1", "--resume", "--set=study.max_hours=0.0001")) == 0
        assert [trial.state for trial in search.trials()] == [TrialState.COMPLETE] * 2
        assert "Ended by max_hours: 0.0001 h are over." in search.log
        shown = json.loads(said(tmp_path, "show", "s", "--json"))
        assert shown["ended_by"]["budget"] == "max_hours"
        assert shown["best"] is not None
        refused = search.start("--extend=1", "--set=study.max_hours=0.0001")
        assert search.ends(refused) == 2
    finally:
        kill_searches()


@pytest.mark.slow
def test_a_study_of_a_server_is_steered_as_any_other(tmp_path: Path) -> None:
    with server() as running:
        where = ("--study-database", running.url)
        space = load_space(None, [*TRIAL, "study.name=s", "study.scheduler=none", "study.num_trials=4"])
        study = open_study(space, Layout(tmp_path / "runs", running.url), {})
        assert next_trial(study) == 0
        assert "trial 1 is the next one" in said(tmp_path, "enqueue", "s", "rank=16", *where)
        assert next_trial(study) == 1
        assert study.config(1).rank == 16
        said(tmp_path, "stop", "s", "--trial", "0", *where)
        assert study.report(0, told(1)) is Status.COMPLETE
        refused = typed(tmp_path, "delete", "s", "--yes", *where)
        assert (refused.exit_code, "is being searched by another process" in refused.stderr) == (2, True)
        with ThreadPoolExecutor() as pool:  # which waits until nobody runs it
            stopping = pool.submit(said, tmp_path, "stop", "s", *where)
            while not study.asked_to_stop():
                assert not stopping.done()
            study.release()
            assert "stopped" in stopping.result()
        assert "removed" in said(tmp_path, "delete", "s", "--yes", *where)
        assert json.loads(said(tmp_path, "show", "--json", *where)) == []
