"""The study database as the truth: proposals, reports, early stops, interruptions."""

from __future__ import annotations

import errno
import json
import math
import re
import shlex
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState
from tiny_trials import next_trial

from bilora_ray.checking import before
from bilora_ray.config import TrialConfig
from bilora_ray.errors import GO_ON, MachineError, UserError
from bilora_ray.records import Status, TrialRecord
from bilora_ray.search.space import Space, StudyConfig
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study import storage as storage_module
from bilora_ray.search.study import study as study_module
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import SAMPLERS
from bilora_ray.search.study.schedulers import SCHEDULERS
from bilora_ray.search.study.storage import naming_the_database, open_storage, running_study, study_names
from bilora_ray.search.study.studies import (
    ONLY,
    SPACE,
    check_study,
    delete_study,
    load_study,
    num_trials_before,
    summarise,
)
from bilora_ray.search.study.studies import open_study as open_study_on
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.training.folder import STATE, TENSORS

STUDY = {"name": "s", "num_trials": 4, "scheduler": "none"}
DIGESTS = {"org/data": "0123"}
TRIAL = {
    "model_name_or_path": "org/model",
    "task": "causal-lm",
    "train_data": "org/data",
    "rho": "{low: 0.01, high: 0.2, log: true}",
    "rank": "{choice: [4, 8, 16]}",
}


def space(study: dict[str, Any] | None = None, trial: dict[str, Any] | None = None) -> Space:
    """A space as a new search pins it: with the settings that not every version had."""
    sections = {"study": {**STUDY, **(study or {})}, "trial": {**TRIAL, **(trial or {})}}
    given = [f"{name}.{key}={v}" for name, values in sections.items() for key, v in values.items()]
    found = load_space(None, given)
    newer = {key: TrialConfig.model_fields[key].default for key in before(TrialConfig)}
    return replace(found, fixed={**newer, **found.fixed})


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "runs")


OPENED: list[SearchStudy] = []


def open_study(space: Space, layout: Layout) -> SearchStudy:
    """The study as a new process sees it, which has no other beside it."""
    while OPENED:
        OPENED.pop().release()
    OPENED.append(open_study_on(space, layout, DIGESTS))
    return OPENED[-1]


def run(study: SearchStudy, number: int, losses: list[float]) -> Status:
    """Report `losses` as a trial would; a report of the last one ends it."""
    status = Status.RUNNING
    for step, loss in enumerate(losses, start=1):
        status = study.report(number, {"step": step, "max_steps": len(losses), "eval_loss": loss})
        if status is not Status.RUNNING:
            break
    return status


def all_proposals(space: Space, layout: Layout, interrupt: bool) -> list[dict[str, Any]]:
    study = open_study(space, layout)
    while (number := next_trial(study)) is not None:
        if interrupt:
            study = open_study(space, layout)
            assert next_trial(study) == number
        run(study, number, [1.0 / (1 + number)])
    return [dict(record.sampled) for record in study.records()]


@pytest.mark.parametrize(("setting", "table"), [("sampler", SAMPLERS), ("scheduler", SCHEDULERS)])
def test_each_word_that_a_space_file_may_say_has_its_entry(setting: str, table: dict[str, Any]) -> None:
    assert get_args(StudyConfig.model_fields[setting].annotation) == tuple(table)


def test_the_value_of_a_complete_trial_is_its_best_evaluation(layout: Layout) -> None:
    study = open_study(space(), layout)
    number = next_trial(study)
    assert number == 0
    assert run(study, number, [3.0, 1.0, 2.0]) is Status.COMPLETE
    assert study.record(0).value == 1.0


def test_greater_is_better_makes_the_best_the_largest(layout: Layout) -> None:
    study = open_study(space(trial={"metric": "eval_token_accuracy"}), layout)
    for values in ([0.1, 0.5, 0.2], [0.3, 0.4, 0.2]):
        number = next_trial(study)
        assert number is not None
        for step, value in enumerate(values, start=1):
            study.report(number, {"step": step, "max_steps": 3, "eval_token_accuracy": value})
    best = study.best()
    assert best is not None
    assert (best.number, best.value) == (0, 0.5)


def test_as_many_trials_are_handed_out_as_the_study_asks_for(layout: Layout) -> None:
    study = open_study(space(), layout)
    numbers = []
    while (number := next_trial(study)) is not None:
        numbers.append(number)
    assert numbers == [0, 1, 2, 3]
    assert not study.finished()


def test_an_interrupted_trial_is_handed_out_again_before_a_new_one_with_the_same_settings(layout: Layout) -> None:
    study = open_study(space(), layout)
    first, second = next_trial(study), next_trial(study)
    assert (first, second) == (0, 1)
    run(study, 0, [1.0])
    again = open_study(space(), layout)
    assert next_trial(again) == 1
    assert again.config(1) == study.config(1)
    assert next_trial(again) == 2


def test_a_trial_that_died_between_being_asked_for_and_sampled_is_completed(layout: Layout) -> None:
    study = open_study(space(), layout)
    study.study.ask()
    again = open_study(space(), layout)
    assert set(again.record(0).sampled) == {"rho", "rank"}
    assert next_trial(again) == 0
    undisturbed = open_study(space(), Layout(layout.storage_path / "other"))
    next_trial(undisturbed)
    assert again.record(0).sampled == undisturbed.record(0).sampled


def test_proposals_do_not_depend_on_interruptions(tmp_path: Path) -> None:
    many = space({"num_trials": 15})
    whole = all_proposals(many, Layout(tmp_path / "a"), interrupt=False)
    interrupted = all_proposals(many, Layout(tmp_path / "b"), interrupt=True)
    assert whole == interrupted
    assert len({json.dumps(proposal) for proposal in whole}) == 15


def test_another_seed_gives_other_proposals(tmp_path: Path) -> None:
    one = all_proposals(space(), Layout(tmp_path / "a"), interrupt=False)
    other = all_proposals(space({"seed": 1}), Layout(tmp_path / "b"), interrupt=False)
    assert one != other


def test_a_report_told_twice_changes_nothing(layout: Layout) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    study.report(0, {"step": 1, "max_steps": 3, "eval_loss": 2.0})
    again = open_study(space(), layout)
    next_trial(again)
    assert again.report(0, {"step": 1, "max_steps": 3, "eval_loss": 2.0}) is Status.RUNNING
    assert again.report(0, {"step": 3, "max_steps": 3, "eval_loss": 1.0}) is Status.COMPLETE
    assert again.study.trials[0].intermediate_values == {1: 2.0, 3: 1.0}


def test_a_trial_that_finished_but_was_not_told_completes_on_resume(layout: Layout) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    for step, loss in ((1, 2.0), (2, 1.0)):
        study._live[0].report(loss, step)  # the process died before the study could end the trial
    again = open_study(space(), layout)
    next_trial(again)
    assert run(again, 0, [2.0, 1.0]) is Status.COMPLETE
    assert again.record(0).value == 1.0


def test_weak_trials_stop_at_the_rungs_of_successive_halving(layout: Layout) -> None:
    study = open_study(space({"scheduler": "asha", "grace_period": 2, "num_trials": 20}), layout)
    statuses = []
    for loss in (1.0, 2.0, 3.0, 0.5):
        number = next_trial(study)
        assert number is not None
        statuses.append(run(study, number, [loss] * 9))
    assert statuses == [Status.COMPLETE, Status.PRUNED, Status.PRUNED, Status.COMPLETE]
    assert list(study.study.trials[1].intermediate_values) == [1, 2]


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_stopped_trial_writes_until_it_hears_of_it_takes_no_room(layout: Layout, killed: bool) -> None:
    study = open_study(space({"scheduler": "asha", "grace_period": 2, "num_trials": 2}), layout)
    for losses in ([1.0] * 9, [2.0] * 9):
        number = next_trial(study)
        assert number is not None
        status = run(study, number, losses)
    assert status is Status.PRUNED
    late = study.folder(1).checkpoint_at(3)

    def write() -> None:
        time.sleep(0.5)
        late.mkdir(parents=True)
        (late / STATE).write_text("{}")
        (late / TENSORS).write_bytes(bytes(100))

    with ThreadPoolExecutor() as executor:
        with study.folder(1).lock(0):
            settled = None if killed else executor.submit(study.settle)
            write()
        if settled is None:  # the search died, and another one goes on
            assert (late / TENSORS).exists()
            open_study(study.space, layout)
        else:
            settled.result()
    assert [path.name for path in late.iterdir()] == [STATE]


def test_early_stops_after_a_resume_are_those_of_the_whole_search(tmp_path: Path) -> None:
    halving = space({"scheduler": "asha", "grace_period": 1, "num_trials": 12})
    losses = [[(number * 7919 % 13) / 10 + 1 / step for step in range(1, 10)] for number in range(12)]

    def search(layout: Layout, resume: bool) -> list[tuple[Status, int]]:
        study = open_study(halving, layout)
        while (number := next_trial(study)) is not None:
            run(study, number, losses[number])
            if resume:
                study = open_study(halving, layout)
        return [(r.status, len(study.study.trials[r.number].intermediate_values)) for r in study.records()]

    whole = search(Layout(tmp_path / "a"), resume=False)
    assert whole == search(Layout(tmp_path / "b"), resume=True)
    assert {status for status, _ in whole} == {Status.COMPLETE, Status.PRUNED}


@pytest.mark.parametrize("after", ["report", "rung"])
def test_a_verdict_that_a_kill_took_away_is_reached_again(layout: Layout, after: str) -> None:
    halving = space({"scheduler": "asha", "grace_period": 2, "num_trials": 5})
    study = open_study(halving, layout)
    next_trial(study)
    run(study, 0, [1.0] * 9)
    next_trial(study)
    study.report(1, {"step": 1, "max_steps": 9, "eval_loss": 2.0})
    study._live[1].report(2.0, 2)
    if after == "rung":  # and the process dies before the trial is told
        assert SuccessiveHalvingPruner(min_resource=2, reduction_factor=3).prune(study.study, study.study.trials[1])
    again = open_study(halving, layout)
    next_trial(again)
    assert again.report(1, {"step": 1, "max_steps": 9, "eval_loss": 2.0}) is Status.RUNNING
    assert again.report(1, {"step": 2, "max_steps": 9, "eval_loss": 2.0}) is Status.PRUNED


def test_a_trial_that_passed_a_rung_passes_it_again_after_a_resume(layout: Layout) -> None:
    halving = space({"scheduler": "asha", "grace_period": 2, "num_trials": 5})
    study = open_study(halving, layout)
    next_trial(study)
    study.report(0, {"step": 2, "max_steps": 9, "eval_loss": 2.0})
    next_trial(study)
    run(study, 1, [1.0] * 9)
    again = open_study(halving, layout)
    next_trial(again)
    assert again.report(0, {"step": 2, "max_steps": 9, "eval_loss": 2.0}) is Status.RUNNING


@pytest.mark.parametrize(("factor", "first"), [(None, 20), (2, 20), (3, 26), (4, 20)])
def test_the_first_rung_is_a_part_of_a_trial_unless_said(layout: Layout, factor: int | None, first: int) -> None:
    settings = {} if factor is None else {"reduction_factor": factor}
    study = open_study(space({"scheduler": "asha", **settings}), layout)
    next_trial(study)
    study.report(0, {"step": first, "max_steps": 80, "eval_loss": 1.0})
    next_trial(study)
    assert study.report(1, {"step": first - 1, "max_steps": 80, "eval_loss": 2.0}) is Status.RUNNING
    assert study.report(1, {"step": first, "max_steps": 80, "eval_loss": 2.0}) is Status.PRUNED


def test_what_a_file_leaves_unsaid_is_as_the_study_began(layout: Layout) -> None:
    study = open_study(space({"scheduler": "asha", "reduction_factor": 3, "grace_period": 10}), layout)
    next_trial(study)
    study.release()
    study = open_study(space({"scheduler": "asha", "grace_period": 10}), layout)
    for number in range(3):
        next_trial(study)
        study.report(number, {"step": 10, "max_steps": 80, "eval_loss": 3.0 - number})
    next_trial(study)
    # The second of four is among the better half, and not among the better third.
    assert study.report(3, {"step": 10, "max_steps": 80, "eval_loss": 1.5}) is Status.PRUNED


def test_another_part_than_a_study_began_with_is_refused(layout: Layout) -> None:
    study = open_study(space({"scheduler": "asha"}), layout)
    next_trial(study)
    study.release()
    with pytest.raises(UserError, match="reduction_factor was 2, is 3"):
        open_study(space({"scheduler": "asha", "reduction_factor": 3}), layout)
    assert open_study(space({"scheduler": "asha", "reduction_factor": 2}), layout)


def test_a_study_that_began_with_a_ninth_goes_on_with_it(layout: Layout) -> None:
    study = open_study(space({"scheduler": "asha"}), layout)
    study.study.set_user_attr("grace_rows", 10 * 8)
    next_trial(study)
    study.report(0, {"step": 10, "max_steps": 90, "eval_loss": 1.0})
    next_trial(study)
    assert study.report(1, {"step": 10, "max_steps": 90, "eval_loss": 2.0}) is Status.PRUNED


def test_the_first_rung_is_decided_by_one_search_at_a_time(layout: Layout) -> None:
    study = open_study(space({"scheduler": "asha"}), layout)
    next_trial(study)
    with ThreadPoolExecutor() as threads:
        with layout.choosing("s"):  # another search has found no first rung, and is about to decide
            report = threads.submit(study.report, 0, {"step": 10, "max_steps": 90, "eval_loss": 1.0})
            wait([report], timeout=1.0)
            study.study.set_user_attr("grace_rows", 40 * 8)
        assert report.result() is Status.RUNNING
    assert study.report(0, {"step": 40, "max_steps": 90, "eval_loss": 1.0}) is Status.RUNNING
    next_trial(study)
    assert study.report(1, {"step": 10, "max_steps": 90, "eval_loss": 2.0}) is Status.RUNNING
    assert study.report(1, {"step": 40, "max_steps": 90, "eval_loss": 2.0}) is Status.PRUNED
    assert study.study.user_attrs["grace_rows"] == 40 * 8


BATCHES = {"per_device_train_batch_size": "{choice: [8, 32]}", "gradient_accumulation_steps": 2}


def two_batches(layout: Layout, **study: Any) -> SearchStudy:
    """A study whose first trial has steps of 64 rows and whose second has steps of 16 rows."""
    points = "[{per_device_train_batch_size: 32}, {per_device_train_batch_size: 8}]"
    searched = space({"scheduler": "asha", "points_to_evaluate": points, **study}, BATCHES)
    opened = open_study(searched, layout)
    assert [next_trial(opened), next_trial(opened)] == [0, 1]
    return opened


def last_steps(study: SearchStudy, losses: tuple[float, float], steps: tuple[int, int]) -> list[tuple[Status, int]]:
    """How each of two trials ended, and after how many steps, if the first has all of its evaluations first."""
    for number in (0, 1):
        run(study, number, [losses[number]] * steps[number])
    trials = study.study.trials
    return [(record.status, max(trials[record.number].intermediate_values)) for record in study.records()]


@pytest.mark.parametrize("grace_period", [9, None])
def test_trials_of_different_batches_are_compared_after_as_many_rows(layout: Layout, grace_period: int | None) -> None:
    settings = {"reduction_factor": 3} if grace_period is None else {"grace_period": grace_period}
    study = two_batches(layout, **settings)
    # Nine steps of 64 rows, or the third part of 27, are 36 of 16.
    assert last_steps(study, (1.0, 2.0), (27, 108)) == [(Status.COMPLETE, 27), (Status.PRUNED, 36)]


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_rung_of_trials_of_as_many_steps_is_the_shortest_ones(layout: Layout, first: int) -> None:
    searched = space({"scheduler": "asha", "reduction_factor": 3}, {**BATCHES, "max_steps": 27})
    study = open_study(searched, layout)
    assert [next_trial(study), next_trial(study)] == [0, 1]
    study.report(first, {"step": 1, "max_steps": 27, "eval_loss": 1.0})
    assert study.study.user_attrs["grace_rows"] == 9 * 16


def test_a_trial_whose_search_died_as_it_was_failed_is_not_handed_out_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(space(), layout)
    number = next_trial(study)
    assert number == 0
    with monkeypatch.context() as patch:
        patch.setattr(study, "_end", raising(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            study.fail(number, "loss is nan at step 3", by_settings=True)
    study = open_study(space(), layout)
    assert next_trial(study) == 1
    record = study.record(0)
    assert (record.status, record.error) == (Status.FAILED, "loss is nan at step 3")


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_study_of_version_0_1_0_goes_on_with_rungs_in_steps(layout: Layout) -> None:
    study = two_batches(layout, grace_period=3)
    study.study.set_user_attr("grace_period", 3)
    assert last_steps(study, (1.0, 2.0), (27, 108)) == [(Status.COMPLETE, 27), (Status.PRUNED, 3)]


def test_settings_of_another_method_are_not_searched(layout: Layout) -> None:
    study = open_study(space({"num_trials": 12}, {"method": "{choice: [lora, bilora]}"}), layout)
    while next_trial(study) is not None:
        pass
    sampled = [dict(record.sampled) for record in study.records()]
    assert {frozenset(s) for s in sampled if s["method"] == "lora"} == {frozenset({"method", "rank"})}
    assert {frozenset(s) for s in sampled if s["method"] == "bilora"} == {frozenset({"method", "rank", "rho"})}


def test_points_to_evaluate_come_first_and_only_once(layout: Layout) -> None:
    pointed = space({"points_to_evaluate": "[{rho: 0.05, rank: 8}, {rho: 0.1, rank: 4}]"})
    study = open_study(pointed, layout)
    assert next_trial(study) == 0
    study = open_study(pointed, layout)
    while next_trial(study) is not None:
        pass
    sampled = [dict(record.sampled) for record in study.records()]
    assert sampled[:2] == [{"rho": 0.05, "rank": 8}, {"rho": 0.1, "rank": 4}]
    assert len(sampled) == 4


def test_points_that_leave_a_setting_open_get_different_values_for_it(layout: Layout) -> None:
    study = open_study(space({"points_to_evaluate": "[{rank: 4}, {rank: 8}, {rank: 16}]", "num_trials": 6}), layout)
    while next_trial(study) is not None:
        pass
    assert len({record.sampled["rho"] for record in study.records()}) == 6


@pytest.mark.parametrize("by_settings", [True, False])
def test_a_failed_trial_keeps_its_reason_and_counts(layout: Layout, by_settings: bool) -> None:
    study = open_study(space({"num_trials": 1}), layout)
    next_trial(study)
    study.fail(0, "loss is nan at step 3", by_settings)
    assert (study.record(0).status, study.record(0).error) == (Status.FAILED, "loss is nan at step 3")
    assert study.finished()
    assert study.best() is None
    assert study.study.trials[0].state is (TrialState.PRUNED if by_settings else TrialState.FAIL)
    again = open_study(space({"num_trials": 1}), layout)
    assert next_trial(again) is None
    assert again.records() == load_study(layout, "s").records() == study.records()


def test_a_trial_that_version_0_1_0_failed_reads_as_failed(layout: Layout) -> None:
    study = open_study(space({"num_trials": 1}), layout)
    next_trial(study)
    study._live[0].set_user_attr("error", "loss is nan at step 3")
    study.study.tell(0, state=TrialState.FAIL)
    assert (study.record(0).status, study.record(0).error) == (Status.FAILED, "loss is nan at step 3")


def test_a_verdict_that_was_not_told_is_no_verdict(layout: Layout) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    study._live[0].set_user_attr("error", "out of GPU memory")  # and the process dies
    again = open_study(space(), layout)
    next_trial(again)
    assert run(again, 0, [1.0]) is Status.COMPLETE
    assert again.record(0).error is None


def exploding(layout: Layout, seed: int, metric: str, by_settings: bool, sampler: str = "tpe") -> float:
    """The share of later proposals at learning rates above 0.001, where each trial diverges after the best evaluation
    of all; the best rates that work are just below.
    """
    names = {"seed": seed, "num_trials": 24, "sampler": sampler}
    searched = space(names, {"metric": metric, "learning_rate": "{low: 1.0e-6, high: 1, log: true}"})
    memory = optuna.create_study(direction="minimize" if metric == "eval_loss" else "maximize")
    study, proposed = SearchStudy(memory, searched, Layout(layout.storage_path / f"{seed}{by_settings}")), []
    study.layout.make(memory.study_name)
    while (number := next_trial(study)) is not None:
        exponent = math.log10(study.config(number).learning_rate)
        proposed.append(exponent > -3)
        loss = 0.0 if exponent > -3 else 2 + abs(exponent + 3.2)
        step = 60 if exponent > -3 else 100
        study.report(number, {"step": step, "max_steps": 100, metric: loss if metric == "eval_loss" else 9 - loss})
        if exponent > -3:
            study.fail(number, "loss is nan", by_settings)
    study.release()
    return sum(proposed[8:]) / len(proposed[8:])


@pytest.mark.parametrize("metric", ["eval_loss", "eval_token_accuracy"])
def test_the_search_keeps_away_from_where_trials_diverge(layout: Layout, metric: str) -> None:
    blind, taught = ([exploding(layout, seed, metric, by) for seed in range(12)] for by in (False, True))
    assert sum(taught) < sum(blind) / 2


def test_proposals_at_random_do_not_depend_on_failures(layout: Layout) -> None:
    assert exploding(layout, 0, "eval_loss", True, "random") == exploding(layout, 0, "eval_loss", False, "random")


def test_while_every_trial_has_failed_none_is_followed(layout: Layout) -> None:
    failing, blind = space({"num_trials": 12}), space({"num_trials": 12, "sampler": "random", "name": "t"})
    studies = [open_study_on(each, layout, DIGESTS) for each in (failing, blind)]
    for study in studies:
        while (number := next_trial(study)) is not None:
            study.fail(number, "out of GPU memory", by_settings=True)
    tpe, random = ([record.sampled for record in study.records()] for study in studies)
    assert tpe == random


def test_a_study_is_shown_without_its_space_file(layout: Layout) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    run(study, 0, [1.0])
    shown = load_study(layout, "s")
    assert shown.records() == study.records()
    assert shown.space.distributions == study.space.distributions
    assert shown.space.study == study.space.study


@pytest.mark.parametrize(
    ("resume", "begun", "now", "line"),
    [
        (True, None, {}, "study 's': nothing to resume in {storage}"),
        (True, {"name": "t"}, {}, "study 's': nothing to resume in {storage}; allowed: t"),
        (
            False,
            {},
            {},
            "study 's' exists in {storage}: go on with --resume, or give this one another name",
        ),
        (
            True,
            {},
            {"seed": 1},
            f"study 's' began with other space: study.seed was 0, is 1; {ONLY}",
        ),
    ],
)
def test_a_wrong_start_is_refused_before_anything_is_written(
    layout: Layout, resume: bool, begun: dict[str, Any] | None, now: dict[str, Any], line: str
) -> None:
    if begun is not None:
        next_trial(open_study(space(begun), layout))
    before = sorted(layout.storage_path.rglob("*")) if begun is not None else None
    with pytest.raises(UserError) as error:
        check_study(space(now), layout, resume, DIGESTS)
    assert str(error.value) == line.format(storage=layout.storage_path)
    assert before is None or sorted(layout.storage_path.rglob("*")) == before
    assert begun is not None or not layout.storage_path.exists()


@pytest.mark.parametrize(
    ("trial", "difference"),
    [
        ({"rho": 0.05}, "rho was 0.01 to 0.2, on a log scale, is 0.05"),
        ({"rank": 4}, "rank was one of 4, 8, 16, is 4"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0, is 0.1"),
        ({"seed": 1}, "seed was 0, is 1"),
    ],
)
def test_a_resume_with_another_setting_says_what_it_was(layout: Layout, trial: dict[str, Any], difference: str) -> None:
    next_trial(open_study(space(), layout))
    with pytest.raises(UserError, match=re.escape(f"began with other space: {difference}; of a study only")):
        check_study(space(trial=trial), layout, True, DIGESTS)


@pytest.mark.parametrize(
    ("key", "was", "now", "typed"),
    [
        ("rho", "{low: 0.005, high: 0.5, log: true}", "{low: 0.005, high: 1, log: true}", None),
        ("rank", "{choice: [8, 16]}", "8", None),
        ("max_steps", "{low: 10, high: 30, step: 10}", "20", "{low: 10.0, high: 30.0, step: 10.0}"),
        ("weight_decay", "{low: 0, high: 0.1}", "0", "{low: 0.0, high: 0.1}"),
        ("lr_scheduler_type", "{choice: [cosine, linear]}", "cosine", '{choice: ["cosine", "linear"]}'),
    ],
)
def test_a_resume_with_another_distribution_says_how_to_give_what_it_was(
    layout: Layout, key: str, was: str, now: str, typed: str | None
) -> None:
    next_trial(open_study(space(trial={key: was}), layout))
    with pytest.raises(UserError, match=r"; go on with --set '") as error:
        check_study(space(trial={key: now}), layout, True, DIGESTS)
    _, value = shlex.split(str(error.value).partition("; go on with ")[2])
    assert value == f"{key}={typed or was}"
    check_study(space(trial={key: value.partition("=")[2]}), layout, True, DIGESTS)


@pytest.mark.parametrize(
    ("key", "now", "difference"),
    [
        ("points_to_evaluate", "[{rank: 4}]", "study.points_to_evaluate was [], is [{'rank': 4}]"),
        ("objectives", "[{metric: eval_loss}]", "study.objectives was [], is [{'metric': 'eval_loss', 'mode': None}]"),
    ],
)
def test_a_resume_with_another_list_of_the_study_says_what_it_was(
    layout: Layout, key: str, now: str, difference: str
) -> None:
    next_trial(open_study(space(), layout))
    with pytest.raises(UserError, match=re.escape(difference)):
        check_study(space({key: now}), layout, True, DIGESTS)


def test_a_resume_with_another_mapping_says_what_it_was(layout: Layout) -> None:
    chats = {"messages_column": "m", "chat_template_kwargs": "{low: 1}"}
    next_trial(open_study(space(trial=chats), layout))
    check_study(space(trial=chats), layout, True, DIGESTS)
    for now, words in (("{low: 1, high: 2}", "{'low': 1, 'high': 2}"), ("null", "None")):
        line = f"began with other space: chat_template_kwargs was {{'low': 1}}, is {words}; of a study only"
        with pytest.raises(UserError, match=re.escape(line)):
            check_study(space(trial={**chats, "chat_template_kwargs": now}), layout, True, DIGESTS)


@pytest.mark.parametrize("section", ["study", "resources"])
def test_what_an_earlier_version_did_not_know_has_its_default(layout: Layout, section: str) -> None:
    study, key = open_study(space(), layout), {"study": "scheduler", "resources": "workers"}[section]
    next_trial(study)
    begun = space({"scheduler": "asha"})
    described = study.study.user_attrs[SPACE]
    described["study"]["scheduler"] = "asha"  # the default
    del described[section][key]
    study.study.set_user_attr(SPACE, described)
    check_study(begun, layout, True, DIGESTS)
    shown = load_study(layout, "s").space
    assert (shown.study, shown.resources) == (begun.study, begun.resources)
    assert next_trial(open_study(begun, layout)) == 0
    with pytest.raises(UserError, match=r"began with other space: study\.scheduler was 'asha', is 'none'"):
        check_study(space(), layout, True, DIGESTS)


@pytest.mark.parametrize("now", [False, True])
def test_a_setting_that_has_its_default_is_as_good_as_absent(layout: Layout, now: bool) -> None:
    plain, said = space(), space(trial={"weight_decay": "0", "column_names": "null", "seed": 0})
    next_trial(open_study(plain if now else said, layout))
    check_study(said if now else plain, layout, True, DIGESTS)
    with pytest.raises(UserError, match="began with other space: seed was 0, is 1"):
        check_study(space(trial={"seed": 1}), layout, True, DIGESTS)


@pytest.mark.parametrize(
    ("part", "key"),
    [("study", "study.new"), ("resources", "resources.new"), ("fixed", "trial.new"), ("distributions", "trial.new")],
)
def test_a_study_of_a_later_version_is_told_in_a_line(layout: Layout, part: str, key: str) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    described = study.study.user_attrs[SPACE]
    described[part]["new"] = {"choice": [1]} if part == "distributions" else 1
    study.study.set_user_attr(SPACE, described)
    line = f"study 's': a later version wrote it, with {key}, which this one lacks"
    for look in (lambda: load_study(layout, "s"), lambda: check_study(space(), layout, True, DIGESTS)):
        with pytest.raises(UserError) as error:
            look()
        assert str(error.value) == line
    assert [summary.study for summary in summarise(layout)] == ["s"]


def test_a_word_of_a_later_version_is_told_in_a_line(layout: Layout) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    described = study.study.user_attrs[SPACE]
    described["study"]["sampler"] = "oracle"
    study.study.set_user_attr(SPACE, described)
    with pytest.raises(UserError, match=r"^study s: study: sampler: .*'tpe', .*, got 'oracle'$"):
        load_study(layout, "s")


def test_a_study_that_never_handed_out_a_trial_is_made_anew(layout: Layout) -> None:
    open_study(space({"points_to_evaluate": "[{rho: 0.1}]"}), layout)
    check_study(space(), layout, False, DIGESTS)
    study = open_study(space(trial={"metric": "eval_token_accuracy"}), layout)
    assert study.objective.greater_is_better
    next_trial(study)
    assert study.record(0).sampled["rho"] != 0.1


def test_other_data_is_refused_on_resume(layout: Layout) -> None:
    next_trial(open_study(space(), layout))
    with pytest.raises(UserError) as error:
        check_study(space(), layout, True, {"org/data": "4567"})
    assert str(error.value) == (f"study 's' began with other data: org/data was '0123', is '4567'; {ONLY}")


def test_trials_that_the_database_does_not_know_are_not_written_over(layout: Layout) -> None:
    layout.trial("s", 0).checkpoints.mkdir(parents=True)
    with pytest.raises(UserError) as error:
        check_study(space(), layout, False, DIGESTS)
    trials = layout.storage_path / "studies" / "s" / "trials"
    assert str(error.value) == f"{trials}: holds trials that the study database does not know; move it away"


def test_a_file_that_is_no_database_is_named(layout: Layout) -> None:
    layout.storage_path.mkdir()
    layout.database_file.write_text("this is no database, whatever its name says")
    with pytest.raises(UserError) as error:
        open_storage(layout)
    file = layout.storage_path / "studies.db"
    assert str(error.value) == f"{file}: is not a database of studies that this version can read"


def test_a_database_of_something_else_is_told_from_one_that_another_process_holds(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_study(space(), layout)
    monkeypatch.setattr(storage_module, "READ_WAIT_S", 0.1)
    with closing(sqlite3.connect(layout.database_file)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(MachineError) as busy, naming_the_database(layout, then=""):
            load_study(layout, "s")
        connection.rollback()
        connection.execute("DROP TABLE version_info")
        connection.execute("CREATE TABLE version_info (what TEXT)")
    with pytest.raises(UserError) as foreign, naming_the_database(layout, then=""):
        load_study(layout, "s")
    assert str(busy.value) == f"study database of {layout.storage_path}: database is locked by another process"
    file = layout.database_file
    assert str(foreign.value) == f"{file}: is not a database of studies that this version can read"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "Full", "{path}/a"), "--storage-path {path}: Full: {path}/a"),
        (OSError(errno.ENOSPC, "Full", "/tmp/a", None, "{path}/a"), "--storage-path {path}: Full: {path}/a"),
        (OSError(errno.ENOSPC, "Full", "/elsewhere"), "Full: /elsewhere"),
        (OSError(errno.ENOSPC, "Full"), "Full"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out", "/nfs/a"), "Connection timed out: /nfs/a"),
        (TimeoutError("lock is held by another process"), "lock is held by another process for too long"),
    ],
)
def test_what_the_system_says_is_one_line_whether_or_not_it_names_a_file(
    error: OSError, line: str, layout: Layout
) -> None:
    for attribute in ("filename", "filename2"):
        if (name := getattr(error, attribute)) is not None:
            setattr(error, attribute, name.format(path=layout.storage_path))
    with pytest.raises(MachineError) as caught, naming_the_database(layout):
        raise error
    assert str(caught.value) == line.format(path=layout.storage_path) + GO_ON


def test_more_trials_may_be_asked_for_on_resume(layout: Layout) -> None:
    study = open_study(space(), layout)
    while (number := next_trial(study)) is not None:
        run(study, number, [1.0])
    more = space({"num_trials": 5})
    check_study(more, layout, True, DIGESTS)
    assert next_trial(open_study(more, layout)) == 4


@pytest.mark.parametrize("joining", [False, True])
def test_fewer_trials_than_were_asked_for_are_refused(layout: Layout, joining: bool) -> None:
    next_trial(open_study(space(), layout))
    fewer = space({"num_trials": 3})
    line = "study 's': num_trials was 4, is 3: it may grow only; show and export take a study as it is"
    with pytest.raises(UserError) as error:
        open_study_on(fewer, layout, DIGESTS) if joining else check_study(fewer, layout, True, DIGESTS)
    assert str(error.value) == line
    assert num_trials_before(layout, "s") == 4
    check_study(space(), layout, True, DIGESTS)


def test_a_study_has_one_search_at_a_time(layout: Layout) -> None:
    with running_study(layout, "s"):
        with pytest.raises(UserError) as error, running_study(layout, "s"):
            pass
        with running_study(layout, "another"):
            pass
    assert str(error.value) == "study 's' is being searched by another process"
    with running_study(layout, "s"):
        pass


class Watch:
    """A watcher that remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ended: list[int] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def trial_ended(self, trial: TrialRecord) -> None:
        self.ended.append(trial.number)


@pytest.mark.parametrize("dies", [False, True])
def test_who_waits_for_another_search_hears_of_it_and_of_its_trials(
    layout: Layout, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "POLL_S", 0.05)
    three, watch = space({"num_trials": 3}), Watch()
    mine, other = (open_study_on(three, layout, DIGESTS) for _ in range(2))
    assert [next_trial(mine), next_trial(other), next_trial(other)] == [0, 1, 2]
    run(mine, 0, [1.0])
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(mine.await_others, watch, watch.say)
        _until(lambda: bool(watch.said))
        run(other, 1, [1.0])
        _until(lambda: 1 in watch.ended)
        other.release() if dies else run(other, 2, [1.0])
        assert waiting.result(timeout=20) is dies
    assert watch.said == ["waiting for other searches: they run 2 of the trials"]
    assert watch.ended == ([0, 1] if dies else [0, 1, 2])


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_who_has_nobody_to_wait_for_says_nothing(layout: Layout) -> None:
    study, watch = open_study(space({"num_trials": 1}), layout), Watch()
    next_trial(study)
    run(study, 0, [1.0])
    assert not study.await_others(watch, watch.say)
    assert watch.said == []


def test_a_deleted_study_leaves_nothing(layout: Layout) -> None:
    study = open_study(space(), layout)
    study.folder(0).checkpoints.mkdir(parents=True)
    delete_study(space(), layout)
    assert study_names(layout) == []
    assert not layout.study("s").exists()


def test_no_study_is_named_when_there_is_none(layout: Layout) -> None:
    assert study_names(layout) == []
    assert not layout.storage_path.exists()
    with pytest.raises(UserError) as error:
        load_study(layout, "s")
    assert str(error.value) == f"study 's': not in {layout.storage_path}"


def test_what_mattered_is_told_by_all_trials_that_did_not_fail(layout: Layout) -> None:
    stops = {"num_trials": 24, "scheduler": "asha", "grace_period": 2}
    study = open_study(space(stops), layout)
    for count in range(24):
        number = next_trial(study)
        assert number == count
        if count < 4:
            study.fail(number, "out of memory", by_settings=count % 2 == 0)
        else:
            run(study, number, [float(study.record(number).sampled["rho"])] * 9)
    statuses = [record.status for record in study.records()]
    assert statuses.count(Status.COMPLETE) < 12
    found = study.importances()
    assert (found.rows, found.num_trials, found.unknown) == (16, 20, None)
    assert list(found.shares) == ["rho"]


def test_a_trial_that_is_stopped_early_has_the_value_of_the_adapter_that_it_keeps(layout: Layout) -> None:
    study = open_study(space({"scheduler": "asha", "grace_period": 2, "reduction_factor": 2}), layout)
    run(study, next_trial(study) or 0, [0.1] * 4)
    number = next_trial(study)
    assert number == 1
    history = [{"step": step, "max_steps": 4, "eval_loss": loss} for step, loss in ((1, 0.5), (2, 0.9))]
    checkpoint = study.folder(number).checkpoint_at(2)
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"history": history, "best_step": 1}))
    assert [study.report(number, metrics) for metrics in history] == [Status.RUNNING, Status.PRUNED]
    record = study.record(number)
    assert (record.value, record.adapter) == (0.5, study.folder(number).adapter_at(1))
    best = study.best()
    assert best is not None
    assert best.number == 0


def test_a_trial_that_failed_late_keeps_its_adapter_for_who_names_it(layout: Layout) -> None:
    study = open_study(space(), layout)
    run(study, next_trial(study) or 0, [0.7])
    next_trial(study)
    checkpoint, metrics = study.folder(1).checkpoint_at(1), {"step": 1, "max_steps": 4, "eval_loss": 0.5}
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"history": [metrics], "best_step": 1}))
    study.report(1, metrics)
    study.fail(1, "loss is nan at step 3", by_settings=True)
    view = load_study(layout, "s")
    assert [record.number for record in view.objective.ranked(view.records())] == [0, 1]
    assert view.chosen(None).number == 0
    named = view.chosen(1)
    assert (named.status, named.value, named.adapter) == (Status.FAILED, 0.5, study.folder(1).adapter_at(1))


def test_a_trial_that_no_process_runs_is_shown_as_interrupted(layout: Layout) -> None:
    study = open_study(space(), layout)
    next_trial(study)
    next_trial(study)
    run(study, 0, [1.0])
    shown = load_study(layout, "s")
    assert [record.status for record in shown.records_now()] == [Status.COMPLETE, Status.RUNNING]
    study.release()
    assert [record.status for record in shown.records_now()] == [Status.COMPLETE, Status.INTERRUPTED]
    again = open_study(space(), layout)
    assert next_trial(again) == 1
    assert [record.status for record in again.records_now()] == [Status.COMPLETE, Status.RUNNING]


def test_studies_are_listed_while_a_trial_waits_for_its_turn(layout: Layout) -> None:
    study = open_study(space(), layout)
    number = next_trial(study)
    assert number is not None
    run(study, number, [2.0, 1.0])
    study.study.enqueue_trial({"rank": 8})
    assert [(summary.ended, summary.best) for summary in summarise(layout)] == [(1, 1.0)]
