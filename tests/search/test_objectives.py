"""Several objectives and limits: what a study remembers, how it stops trials, and what it says of the front."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from tiny_trials import Tiny, next_trial

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.search.simulated import Metrics, Moment, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import ABLE_OF_SEVERAL, load_space
from bilora_ray.search.study.control.evaluations import evaluations_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import SAMPLERS
from bilora_ray.search.study.schedulers import OF_SEVERAL, SCHEDULERS
from bilora_ray.search.study.studies import load_study, open_study, summarise
from bilora_ray.search.study.study import SearchStudy

TRIAL = (
    "model_name_or_path=org/model",
    "task=causal-lm",
    "train_data=org/data",
    "rho={low: 0.1, high: 0.9}",
    "rank={choice: [4, 8, 16, 32]}",
    "study.name=s",
    "study.num_trials=12",
)
TWO = "study.objectives=[{metric: eval_loss}, {metric: train_runtime, mode: min}]"


def space(*given: str) -> Space:
    return load_space(None, [*TRIAL, *given])


def opened(path: Path, *given: str) -> SearchStudy:
    return open_study(space(*given), Layout(path), {})


def curve(config: TrialConfig) -> list[Metrics]:
    """Nine evaluations; a larger rank learns more and takes longer, a larger radius is worse."""
    seconds = config.rank / 4
    return [
        {
            "step": step,
            "max_steps": 9,
            "eval_loss": config.rho + 8 / config.rank + 1 / step,
            "train_runtime": seconds * step,
            "adapter_mb": config.rank / 8,
        }
        for step in range(1, 10)
    ]


def told(study: SearchStudy, evaluations: Sequence[tuple[float, float]], max_steps: int = 9) -> Status:
    """The status of a new trial after `evaluations`, each an `eval_loss` and a `train_runtime`."""
    number, status = next_trial(study), Status.RUNNING
    assert number is not None
    for step, (loss, seconds) in enumerate(evaluations, start=1):
        metrics = {"step": step, "max_steps": max_steps, "eval_loss": loss, "train_runtime": seconds}
        status = study.report(number, metrics)
        if status is not Status.RUNNING:
            break
    return status


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["study.objectives=[{metric: eval_los}]"], "objectives[0]: no evaluation tells 'eval_los'; did you mean"),
        ([TWO.replace("train_runtime", "train_time")], "'train_time'; did you mean 'train_runtime'?"),
        (["study.objectives=[{metric: adapter_mb}]"], "adapter_mb cannot choose a trial's adapter"),
        ([TWO.replace("train_runtime", "eval_loss")], "objectives[1]: eval_loss is there already"),
        ([TWO.replace("min", "max")], "objectives[1]: mode of train_runtime is min, got max"),
        (["metric=eval_perplexity", TWO], "the first is eval_loss, and trial.metric is eval_perplexity"),
        ([TWO.replace("train_runtime", "gpu_memory_gib")], "objectives: gpu_memory_gib is known on GPUs only"),
        (["study.max_memory_gb=3"], "max_memory_gb: gpu_memory_gib is known on GPUs only"),
        (["study.max_adapter_mb=0"], "max_adapter_mb: should be greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(given: list[str], problem: str) -> None:
    with pytest.raises(UserError) as raised:
        space(*given)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("setting", "table"), [("sampler", SAMPLERS), ("scheduler", SCHEDULERS)])
def test_what_cannot_take_several_objectives_is_refused(setting: str, table: dict[str, Any]) -> None:
    refused = set(table) - set(ABLE_OF_SEVERAL[setting])
    assert refused
    for word in refused:
        with pytest.raises(UserError, match="of several, allowed"):
            space(TWO, f"study.{setting}={word}")


@pytest.mark.parametrize("sampler", ABLE_OF_SEVERAL["sampler"])
def test_each_sampler_that_takes_several_objectives_runs_a_search_for_two(tmp_path: Path, sampler: str) -> None:
    given = ("study.num_trials=16", "study.scheduler=none", "rho={low: 0.1, high: 0.9, step: 0.1}")
    study = opened(tmp_path, TWO, f"study.sampler={sampler}", *given)
    simulate(study, lambda config: curve(config)[-1:], workers=2)
    records = study.records()
    study.release()
    assert [record.status for record in records] == [Status.COMPLETE] * 16
    assert all(record.values.keys() == {"eval_loss", "train_runtime"} for record in records)
    assert len({tuple(record.sampled.items()) for record in records}) > 8
    assert study.front(records)


def test_each_scheduler_that_takes_several_objectives_has_its_own_rule() -> None:
    assert set(OF_SEVERAL) == set(ABLE_OF_SEVERAL["scheduler"])


def test_the_first_objective_is_the_metric_of_the_trials() -> None:
    found = space("study.objectives=[{metric: eval_perplexity}, {metric: adapter_mb}]")
    assert found.first_config().metric == "eval_perplexity"
    assert [(one.metric, one.greater_is_better) for one in found.objectives] == [
        ("eval_perplexity", False),
        ("adapter_mb", False),
    ]
    assert space().objectives == (space().first_config().objective,)


def test_a_trial_is_worth_all_values_of_the_one_adapter_that_it_keeps(tmp_path: Path) -> None:
    study = opened(tmp_path, TWO, "study.scheduler=none")
    assert told(study, [(3.0, 1.0), (1.0, 2.0), (2.0, 3.0)], max_steps=3) is Status.COMPLETE
    record = study.record(0)
    assert record.values == {"eval_loss": 1.0, "train_runtime": 2.0}
    assert record.value == 1.0
    trial = study.study.trials[0]
    assert trial.values == [1.0, 2.0]
    assert {step: dict(known) for step, known in evaluations_of(trial, study.objectives).items()} == {
        1: {"eval_loss": 3.0, "train_runtime": 1.0},
        2: {"eval_loss": 1.0, "train_runtime": 2.0},
        3: {"eval_loss": 2.0, "train_runtime": 3.0},
    }
    assert [summary.best for summary in summarise(Layout(tmp_path))] == [1.0]
    study.release()


def test_a_trial_goes_on_that_no_other_beats_in_everything(tmp_path: Path) -> None:
    study = opened(tmp_path, TWO, "study.reduction_factor=2")
    # Rungs are after 2, 4 and 8 steps; of two trials there one goes on.
    assert told(study, [(1.0, 1.0), (1.0, 2.0)]) is Status.RUNNING
    assert told(study, [(2.0, 2.0), (2.0, 3.0)]) is Status.PRUNED  # worse in both
    assert told(study, [(3.0, 0.5), (3.0, 1.0)]) is Status.PRUNED  # not worse, but one of three may go on
    assert told(study, [(4.0, 0.5), (4.0, 0.5)]) is Status.RUNNING  # the other end of the front, and two may
    study.release()


def test_a_rung_that_was_noted_before_a_kill_is_judged_after_it_and_only_once(tmp_path: Path) -> None:
    study = opened(tmp_path, TWO, "study.reduction_factor=2")
    told(study, [(1.0, 1.0), (1.0, 2.0)])
    number = next_trial(study)
    assert number == 1
    evaluation = {"step": 2, "max_steps": 9, "eval_loss": 2.0, "train_runtime": 3.0}
    tell, study.study.tell = study.study.tell, None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        study.report(number, evaluation)  # dies as it tells the verdict
    study.study.tell = tell  # type: ignore[method-assign]
    study.release()
    again = opened(tmp_path, TWO, "study.reduction_factor=2")
    assert [next_trial(again), next_trial(again)] == [0, 1]
    assert again.report(0, {"step": 2, "max_steps": 9, "eval_loss": 1.0, "train_runtime": 2.0}) is Status.RUNNING
    assert again.report(1, evaluation) is Status.PRUNED
    assert next_trial(again) == 2
    again.release()


def searched(path: Path, *given: str, keep: bool = False) -> list[Moment]:
    study = opened(path, TWO, *given)
    try:
        return simulate(study, curve, workers=3, keep=keep)
    finally:
        study.release()


def test_a_search_for_two_objectives_stops_some_and_ends_with_its_front(tmp_path: Path) -> None:
    moments = searched(tmp_path / "a", keep=True)
    assert moments == searched(tmp_path / "b")
    study = load_study(Layout(tmp_path / "a"), "s")
    records = study.records()
    assert {record.status for record in records} == {Status.COMPLETE, Status.PRUNED}
    front = study.front(records)
    assert front[0] == study.best() == study.chosen(None)
    by_time = [record.values["train_runtime"] for record in records if record.status is Status.COMPLETE]
    assert study.chosen(None, prefer="train_runtime").values["train_runtime"] == min(by_time)
    with pytest.raises(UserError, match="'train_runtim' is no objective of it; did you mean 'train_runtime'"):
        study.chosen(None, prefer="train_runtim")
    assert study.importances().rows == 8  # by the first objective, at the first rung


def test_of_one_objective_there_is_no_front_and_the_database_holds_what_it_held(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.objectives=[{metric: eval_loss}]", "study.scheduler=none")
    told(study, [(2.0, 1.0), (3.0, 2.0)], max_steps=2)
    trial = study.study.trials[0]
    assert (trial.value, trial.intermediate_values) == (2.0, {1: 2.0, 2: 3.0})
    assert not trial.user_attrs
    assert study.front(study.records()) == []
    study.release()


def test_a_trial_that_breaks_a_limit_ends_and_is_never_best(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.max_adapter_mb=2", "study.scheduler=none")
    moments = simulate(study, curve, workers=1, keep=True)
    records = study.records()
    large = [record for record in records if record.settings["rank"] > 16]
    assert large
    assert len(large) < len(records)
    for record in records:
        kept = record.settings["rank"] <= 16
        assert record.status is (Status.COMPLETE if kept else Status.PRUNED)
        assert record.broken == (None if kept else "max_adapter_mb: adapter_mb is 4, 2 is allowed")
        assert sum(moment.number == record.number for moment in moments) == (9 if kept else 1)
        assert record.error is None
    best = study.best()
    assert best is not None
    assert best.number not in {record.number for record in large}
    assert summarise(Layout(tmp_path))[0].best == best.value
    study.release()


def test_the_sampler_keeps_away_from_what_breaks_a_limit(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.max_adapter_mb=1", "study.scheduler=none", "study.num_trials=40")
    simulate(study, lambda config: curve(config)[-1:], workers=1)
    ranks = [record.settings["rank"] for record in study.records()]
    late = ranks[20:]
    assert sum(rank > 8 for rank in late) < 8  # of which a random one has 10 of 20
    study.release()


def test_a_kill_amid_the_end_of_a_trial_that_breaks_a_limit_ends_it_once(tmp_path: Path) -> None:
    study = opened(tmp_path, "study.max_adapter_mb=1", "study.scheduler=none")
    number = next_trial(study)
    assert number == 0
    study._live[0].set_constraint("max_adapter_mb", 1.0)
    study.release()
    again = opened(tmp_path, "study.max_adapter_mb=1", "study.scheduler=none")
    assert next_trial(again) == 0
    evaluation = {"step": 1, "max_steps": 9, "eval_loss": 2.0, "adapter_mb": 2.0}
    assert again.report(0, evaluation) is Status.PRUNED
    assert again.study.trials[0].state == TrialState.COMPLETE
    assert again.record(0).status is Status.PRUNED
    again.release()


def traded(config: TrialConfig) -> list[Metrics]:
    """Nine evaluations; a larger radius is better and takes longer, by and large."""
    odd = math.sin(1000 * config.rho) / 4
    return [
        {"step": s, "max_steps": 9, "eval_loss": 1 - config.rho + odd + 1 / s, "train_runtime": (1 + config.rho) * s}
        for s in range(1, 10)
    ]


def search_and_die(path: Path, writes: int | None) -> None:
    """A search whose process is killed right after so many writes to the study database; None: it ends."""
    left = itertools.count(writes or 0, -1)

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*arguments: Any, **more: Any) -> Any:
            result = write(*arguments, **more)
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return written

    for name in ("create_new_trial", "set_trial_param", "set_trial_user_attr", "set_trial_state_values"):
        setattr(RDBStorage, name, dying(getattr(RDBStorage, name)))
    study = opened(path, TWO, "rank=8", "study.num_trials=10")
    simulate(study, traded, workers=1)


def ended(path: Path) -> list[tuple[Any, ...]]:
    """How each trial of the study stands, and what is known of it."""
    trials = load_study(Layout(path), "s").study.trials
    return [(trial.number, trial.state, trial.params, trial.values, trial.user_attrs) for trial in trials]


def test_five_kills_leave_the_study_that_none_would_have(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process
    moments = random.Random(5)
    for writes in [*(moments.randrange(4, 12) for _ in range(5)), None]:
        child = process(target=search_and_die, args=(tmp_path / "killed", writes))
        child.start()
        child.join()
        assert child.exitcode == (0 if writes is None else -signal.SIGKILL)
    child = process(target=search_and_die, args=(tmp_path / "whole", None))
    child.start()
    child.join()
    found = ended(tmp_path / "killed")
    assert [number for number, *_ in found] == list(range(10))
    assert {state for _, state, *_ in found} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert found == ended(tmp_path / "whole")


def test_a_limit_that_no_adapter_keeps_to_is_refused_before_anything_starts(tiny: Tiny) -> None:
    from bilora_ray.search.preflight import preflight
    from bilora_ray.training.rehearsal import least_adapter_mb

    data = tiny.folder / "texts-train.jsonl"
    given = [f"model_name_or_path={tiny.model('causal-lm')}", f"train_data={data}", "max_length=64"]
    least = least_adapter_mb(tiny.config("causal-lm", rank=4), None)
    preflight(space(*given, f"study.max_adapter_mb={least * 1.01}"))
    with pytest.raises(UserError, match=f"the smallest adapter, of rank 4, has {least:.4g}"):
        preflight(space(*given, f"study.max_adapter_mb={least * 0.99}"))


def test_a_limit_on_what_is_left_counts_a_model_that_is_trained_whole(tiny: Tiny) -> None:
    from bilora_ray.search.preflight import preflight
    from bilora_ray.training.rehearsal import least_adapter_mb

    data = tiny.folder / "texts-train.jsonl"
    given = [f"model_name_or_path={tiny.model('causal-lm')}", f"train_data={data}", "max_length=64"]
    given += ["rho=0.05", "auxiliary_rank=8"]
    least = least_adapter_mb(tiny.config("causal-lm", method="full"), None)
    limit = f"study.max_adapter_mb={least * 0.99}"
    with pytest.raises(UserError, match=f"the smallest model has {least:.4g}"):
        preflight(space(*given, "method=full", "rank=8", limit))
    preflight(space(*given, "method={choice: [full, lora]}", limit))  # an adapter keeps to it
