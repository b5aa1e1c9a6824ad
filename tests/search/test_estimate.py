"""What a search will take, from what its extreme trials took: the arithmetic, without any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory, UserError
from bilora_ray.search.readiness.corners import (
    BESIDE_A_STEP,
    COUNTED_IN_TRAINING,
    SHARED_BY,
    counts,
    kind_of,
    kinds,
    position,
)
from bilora_ray.search.readiness.estimate import Interval, Measured, ends, estimate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.settings import FACTS
from bilora_ray.training.probe.cost import Cost, cost

GIB = 2**30
TRIAL = (
    *("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "eval_steps=0.2"),
    *("study.name=s", "study.num_trials=8"),
)
COST = Cost(
    start=1.0,
    step=0.5,
    evaluation=2.0,
    step_rows=8,
    train_rows=80,
    row_tokens=30.0,
    memory=2 * GIB,
    adapter=2**20,
    passes=(),
)


@pytest.fixture(autouse=True)
def few_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is true of two searches is of twenty."""
    monkeypatch.setattr("bilora_ray.search.readiness.estimate.FEWEST", 2)
    monkeypatch.setattr("bilora_ray.search.readiness.estimate.MOST", 2)


def space(*settings: str) -> Space:
    return load_space(None, [*TRIAL, *settings])


def of_costs(space: Space, *costs: Cost, at_once: int = 2, room: int = 4 * GIB) -> Any:
    assert len(ends(space)) == len(costs)
    return estimate(space, [(3.0, one) for one in costs], at_once, room, started=5.0)


def test_the_extreme_trials_have_the_ends_of_what_costs_and_the_middle_of_the_rest() -> None:
    found = space(
        "rank={choice: [16, 4, 8]}",
        "rho={low: 0.01, high: 1.0, log: true}",
        "per_device_train_batch_size={low: 1, high: 3}",
    )
    (kind,) = kinds(found)
    assert kind.low == {"rank": 4, "rho": pytest.approx(0.1), "per_device_train_batch_size": 1}
    assert kind.high == {"rank": 16, "rho": pytest.approx(0.1), "per_device_train_batch_size": 3}


@pytest.mark.parametrize("drawn", ["{low: 2, high: 10}", "{choice: [2, 5, 10]}"])
def test_the_rarer_a_second_pass_is_the_cheaper_a_trial_is(drawn: str) -> None:
    found = space("method=looksam", f"looksam_every={drawn}")
    (kind,) = kinds(found)
    assert (kind.low, kind.high) == ({"looksam_every": 10}, {"looksam_every": 2})
    places = [position(found, found.trial_config({"looksam_every": every})) for every in (10, 5, 2)]
    # A step costs 1 + 1 / k passes.
    assert places == pytest.approx([0, (1 / 5 - 1 / 10) / (1 / 2 - 1 / 10), 1])


def test_every_choice_that_is_no_number_is_measured_with_both_ends() -> None:
    found = space("method={choice: [lora, bilora]}", "rank={choice: [4, 8]}", "rho={low: 0.01, high: 1.0}")
    assert [kind.chosen for kind in kinds(found)] == [{"method": "lora"}, {"method": "bilora"}]
    lora, bilora = kinds(found)
    assert lora.high == {"method": "lora", "rank": 8}
    assert bilora.high == {"method": "bilora", "rank": 8, "rho": pytest.approx(0.505)}
    assert kind_of(kinds(found), found.trial_config({"method": "bilora", "rank": 4, "rho": 0.1})) is not lora
    # Of many choices not all are tried with each other, and yet each is tried.
    many = space(
        "method={choice: [lora, bilora]}",
        "quantization={choice: [null, nf4, int8]}",
        "lora_dropout={choice: [0.0, 0.1]}",
        "gradient_checkpointing={choice: [true, false]}",
    )
    tried = [kind.chosen for kind in kinds(many)]
    assert len(tried) == 1 + 1 + 2 + 1
    assert {one["quantization"] for one in tried} == {None, "nf4", "int8"}


def test_each_setting_of_the_training_costs_or_is_known_not_to() -> None:
    free = {
        *("lora_alpha", "rho", "learning_rate", "auxiliary_learning_rate", "weight_decay"),
        *("max_grad_norm", "lr_scheduler_type", "warmup_ratio", "seed", "class_weights", "variant"),
        *("early_stopping_patience", "early_stopping_threshold"),
        *("clip", "norm", "ascent", "looksam_alpha", "bar_alpha", "esam_beta"),
    }
    assert free <= FACTS.keys()
    of_training = {key for key, facts in FACTS.items() if facts.decides == "training" and facts.searched}
    assert of_training - COUNTED_IN_TRAINING <= free
    assert of_training >= COUNTED_IN_TRAINING >= SHARED_BY
    assert FACTS.keys() >= BESIDE_A_STEP
    assert counts("rank")
    assert not counts("rho")


def test_a_trial_between_the_ends_takes_what_is_between() -> None:
    found = space("rank={choice: [4, 8, 12]}", "num_train_epochs=2")
    place = [position(found, found.trial_config({"rank": rank})) for rank in (4, 8, 12)]
    assert place == [0.0, 0.5, 1.0]
    dear = replace(COST, step=1.5, evaluation=4.0, start=3.0)
    told = of_costs(found, COST, dear)
    # 80 rows twice, 8 a step: 20 steps; five evaluations.
    assert told.trial_seconds.low == pytest.approx(1 + 20 * 0.5 + 5 * 2)
    assert told.trial_seconds.high == pytest.approx(3 + 20 * 1.5 + 5 * 4)


def test_without_early_stops_a_search_takes_what_its_trials_take() -> None:
    found = space("rho={low: 0.1, high: 0.9}", "num_train_epochs=1", "study.scheduler=none")
    told = of_costs(found, COST, COST)
    trial = 1 + 10 * 0.5 + 5 * 2
    assert told.trained == Interval(1.0, 1.0, 1.0)
    assert told.wall_seconds.median == pytest.approx(5 + 3 + 8 / 2 * trial)
    assert told.device_hours.median == pytest.approx(8 * trial / 3600)
    assert (told.cost, told.at_once) == (None, 2)


def test_how_long_a_trial_is_trained_moves_nothing_of_what_a_step_takes() -> None:
    settings = ("rank={choice: [4, 8]}", "num_train_epochs={choice: [1, 9]}", "max_train_samples={choice: [16, 80]}")
    found = space(*settings, "seed={choice: [1, 2]}", "split_seed=0")
    chosen = {"rank": 4, "num_train_epochs": 9, "max_train_samples": 16, "seed": 2}
    assert position(found, found.trial_config(chosen)) == 0.0
    assert position(found, found.trial_config({**chosen, "rank": 8})) == 1.0
    (kind,) = kinds(found)
    *_, last = Measured(kind, replace(COST, train_rows=16), COST).evaluations(found, found.trial_config(chosen))
    assert (last["max_steps"], last["epoch"]) == (18, 9.0)
    assert last["num_input_tokens_seen"] == 18 * 8 * 30


@pytest.mark.parametrize("unit", ["steps", "epochs", "rows", "tokens", "seconds"])
def test_early_stops_are_told_what_they_compare_trials_after(unit: str) -> None:
    settings = ("rho={low: 0.1, high: 0.9}", "num_train_epochs=4", "eval_steps=0.1", f"study.rung_unit={unit}")
    assert 0.2 < of_costs(space(*settings), COST, COST).trained.median < 0.9


def test_a_study_is_told_all_that_it_judges_trials_by() -> None:
    objectives = "study.objectives=[{metric: eval_token_accuracy}, {metric: adapter_mb}, {metric: gpu_memory_gib}]"
    settings = (objectives, "rank={choice: [4, 8]}", "resources.gpus_per_worker=1", "num_train_epochs=1")
    large = replace(COST, adapter=3 * 10**6)
    assert of_costs(space(*settings), COST, large).trained.low > 0.1
    # Trials above a limit end at their first evaluation.
    told = of_costs(space(*settings, "study.max_adapter_mb=0.5"), COST, large)
    assert told.trained.high < 0.5


def test_nothing_that_is_drawn_ends_a_search_and_no_earlier_study_is_asked_for() -> None:
    settings = ("rho={low: 0.1, high: 0.9}", "num_train_epochs=1", "study.scheduler=none")
    plain = of_costs(space(*settings), COST, COST)
    ends = ("study.target=100", "study.min_gain=50", "early_stopping_patience=2")
    told = of_costs(space(*settings, *ends, "study.warm_start=[earlier]"), COST, COST)
    assert told.device_hours == plain.device_hours
    assert any("study.target, study.min_gain" in line for line in told.notes)
    assert any("early_stopping_patience" in line for line in told.notes)


def test_finalists_are_trained_on_top() -> None:
    settings = ("rho={low: 0.1, high: 0.9}", "num_train_epochs=1", "study.scheduler=none", "study.price_per_gpu_hour=3")
    plain = of_costs(space(*settings), COST, COST)
    told = of_costs(space(*settings, "study.finalists=2", "study.finalist_seeds=4"), COST, COST)
    trial = 1 + 10 * 0.5 + 5 * 2
    assert told.device_hours.median == pytest.approx(plain.device_hours.median + 8 * trial / 3600)
    assert told.cost.median == pytest.approx(3 * told.device_hours.median)
    assert told.wall_seconds.median == pytest.approx(plain.wall_seconds.median + 5 + 3 + 8 / 2 * trial)
    assert any("2 x 4 trainings" in line for line in told.notes)


def test_early_stops_leave_a_part_of_it() -> None:
    settings = ("rho={low: 0.1, high: 0.9}", "num_train_epochs=4", "eval_steps=0.1")
    told = of_costs(space(*settings), COST, COST)
    assert 0.2 < told.trained.median < 0.9
    assert told.trained.low <= told.trained.median <= told.trained.high


def test_all_devices_of_a_trial_are_paid() -> None:
    settings = ("rho={low: 0.1, high: 0.9}", "num_train_epochs=1", "study.scheduler=none")
    found = space(*settings, "resources.workers=2", "resources.gpus_per_worker=1", "study.price_per_gpu_hour=3")
    of_two = replace(COST, step_rows=16)
    told = of_costs(found, of_two, of_two)
    assert told.cost.median == pytest.approx(3.0 * told.device_hours.median)
    assert told.device_hours.median == pytest.approx(8 * 2 * (1 + 5 * 0.5 + 5 * 2) / 3600)
    assert any("one of 2 workers was run" in line for line in told.notes)


def test_a_space_with_a_trial_that_has_no_room_is_refused() -> None:
    found = space("rank={choice: [4, 64]}")
    with pytest.raises(UserError, match=r"^estimate: a trial with rank=64 takes 9\.0 GiB, and of 2 at one time each"):
        of_costs(found, COST, replace(COST, memory=9 * GIB))
    with pytest.raises(UserError, match=r"^estimate: a trial with rank=64 does not run: no room for one row$"):
        estimate(found, [(1.0, COST), OutOfMemory("no room for one row")], 2, 4 * GIB, started=1.0)


def test_an_interval_holds_eight_of_ten() -> None:
    assert Interval.of(range(100)) == Interval(10, 49.5, 90)
    assert Interval.of([2.0]) == Interval(2.0, 2.0, 2.0)


def test_a_trial_is_measured_by_some_of_its_steps(tmp_path: Path) -> None:
    quickstart = load_space(Path("search_spaces/quickstart.yaml"))
    config: TrialConfig = quickstart.first_config().model_copy(update={"max_eval_samples": 8, "num_train_epochs": 2.0})
    found = cost(config, gpus_per_worker=0)
    assert (found.step_rows, found.train_rows) == (16, 240)
    assert 2 < found.row_tokens < 512
    assert min(found.step, found.evaluation, found.start) > 0
    assert found.memory > 2**27
    assert found.adapter > 0
    assert found.passes == ()
