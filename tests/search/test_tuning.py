"""What Tune is told of the trials that it runs as one, without Tune."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from tiny_trials import next_trial

from bilora_ray.errors import MachineError, UserError
from bilora_ray.records import Status
from bilora_ray.runners.task import BAD_INPUT, BROKEN, BY_SETTINGS, DIGESTS, FAILURE, NUMBER, TRIALS
from bilora_ray.search.session import Observers
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.tuning import StudyScheduler, StudySearcher

SETTINGS = ("study.name=s", "trial.model_name_or_path=org/model", "trial.task=causal-lm", "trial.train_data=org/data")


class Controller:
    """What the scheduler asks of Tune's."""

    stopped = False

    def request_stop_experiment(self) -> None:
        self.stopped = True


@pytest.fixture
def scheduler(tmp_path: Path) -> StudyScheduler:
    """Of a study of which two trials run."""
    space = load_space(None, [*SETTINGS, "trial.rho={low: 0.01, high: 0.2}", "study.scheduler=none"])
    study = open_study(space, Layout(tmp_path / "runs"), {})
    assert [next_trial(study), next_trial(study)] == [0, 1]
    return StudyScheduler(study, Observers([]))


def together() -> Any:
    """Two trials as one of Tune's."""
    return SimpleNamespace(
        config={TRIALS: [{NUMBER: 0}, {NUMBER: 1}]}, num_failures=0, error_file=None, should_recover=lambda: False
    )


def evaluation(number: int, step: int) -> dict[str, Any]:
    return {NUMBER: number, "evaluation/step": step, "evaluation/max_steps": 2, "evaluation/eval_loss": 1.0}


def statuses(scheduler: StudyScheduler) -> list[Status]:
    return [record.status for record in scheduler.study.records()]


def test_trials_that_run_together_go_on_until_the_last_has_ended(scheduler: StudyScheduler) -> None:
    results = [
        evaluation(0, 1),
        evaluation(1, 1),
        evaluation(1, 2),
        {NUMBER: 0, FAILURE: "loss is nan", BY_SETTINGS: True},
    ]
    verdicts = [scheduler.on_trial_result(Controller(), together(), result) for result in results]
    assert verdicts == [TrialScheduler.CONTINUE] * 3 + [TrialScheduler.STOP]
    assert statuses(scheduler) == [Status.FAILED, Status.COMPLETE]
    assert scheduler.study.study.trials[0].state is TrialState.PRUNED  # for the sampler to learn from


def test_a_process_that_dies_fails_all_that_it_ran_and_teaches_nothing(scheduler: StudyScheduler) -> None:
    scheduler.on_trial_error(Controller(), together())
    assert [record.error for record in scheduler.study.records()] == ["its process died"] * 2
    assert {trial.state for trial in scheduler.study.study.trials} == {TrialState.FAIL}


@pytest.mark.parametrize("others_work", [True, False])
def test_bad_input_is_a_trials_own_if_another_has_an_evaluation(scheduler: StudyScheduler, others_work: bool) -> None:
    if others_work:
        checkpoint = scheduler.study.folder(1).checkpoint_at(1)
        checkpoint.mkdir(parents=True)
        history = [{"step": 1, "eval_loss": 1.0}]
        (checkpoint / "state.json").write_text(json.dumps({"history": history, "best_step": 1}))
    controller = Controller()
    verdict = scheduler.on_trial_result(controller, together(), {NUMBER: 0, BAD_INPUT: "rank: is odd"})
    assert verdict == (TrialScheduler.CONTINUE if others_work else TrialScheduler.STOP)
    assert controller.stopped is not others_work
    assert isinstance(scheduler.halted, UserError) is not others_work
    state = scheduler.study.study.trials[0].state
    assert state is (TrialState.PRUNED if others_work else TrialState.FAIL)


def test_what_another_node_may_have_teaches_nothing(scheduler: StudyScheduler) -> None:
    result = {NUMBER: 0, FAILURE: "ImportError: no such package", BY_SETTINGS: False}
    scheduler.on_trial_result(Controller(), together(), result)
    assert scheduler.study.study.trials[0].state is TrialState.FAIL


def test_a_trial_that_has_ended_beside_one_that_goes_on_is_heard_no_more(scheduler: StudyScheduler) -> None:
    for step in (1, 2):
        scheduler.on_trial_result(Controller(), together(), evaluation(0, step))
    again = [evaluation(0, 2), {NUMBER: 0, FAILURE: "late", BY_SETTINGS: False}]
    verdicts = [scheduler.on_trial_result(Controller(), together(), result) for result in again]
    assert verdicts == [TrialScheduler.CONTINUE] * 2
    assert statuses(scheduler) == [Status.COMPLETE, Status.RUNNING]


def test_data_that_go_away_halt_the_search_and_cost_no_trial(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    space = load_space(None, [*SETTINGS[:-1], f"trial.train_data={data}", "trial.rho={low: 0.01, high: 0.2}"])
    study = open_study(space, Layout(tmp_path / "runs"), {})
    assert next_trial(study) == 0
    told, controller = StudyScheduler(study, Observers([])), Controller()
    tune_trial = SimpleNamespace(config={TRIALS: [{NUMBER: 0}]}, num_failures=0, error_file=None)
    data.unlink()
    told.on_trial_result(controller, tune_trial, {NUMBER: 0, BAD_INPUT: "train_data: no such file"})
    assert controller.stopped
    assert isinstance(told.halted, MachineError)
    assert study.record(0).status is Status.RUNNING


def test_a_trial_is_told_what_its_study_began_with(tmp_path: Path) -> None:
    space = load_space(None, [*SETTINGS, "trial.rho={low: 0.01, high: 0.2}", "study.scheduler=none"])
    digests = {"org/data/train": "1", "model org/model": "2", "model another": "3"}
    study = open_study(space, Layout(tmp_path / "runs"), digests)
    (trial,) = StudySearcher(study, Observers([])).suggest("any")[TRIALS]
    assert trial[DIGESTS] == {"train_data": "1", "model_name_or_path": "2"}


def test_a_trial_that_finds_other_rows_stops_the_search_and_stays_to_be_gone_on_with(scheduler: StudyScheduler) -> None:
    scheduler.on_trial_result(Controller(), together(), evaluation(1, 2))
    controller = Controller()
    scheduler.on_trial_result(controller, together(), {NUMBER: 0, BROKEN: "train_data: a has changed"})
    assert controller.stopped
    assert type(scheduler.halted) is MachineError
    assert str(scheduler.halted) == "trial 0: train_data: a has changed; mend that and go on with --resume"
    assert statuses(scheduler) == [Status.RUNNING, Status.COMPLETE]
