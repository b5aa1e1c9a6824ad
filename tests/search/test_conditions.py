"""Conditions, sub-spaces and derived settings: what a trial gets, and that none could be refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.facts import METHOD_NAMES
from bilora_ray.search.readiness.corners import kind_of, kinds
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Range, Space, setting_of
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import Chosen, space_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import SAMPLERS, check_sampler, propose
from bilora_ray.search.study.steering.copying import written
from bilora_ray.search.study.steering.requests import checked
from bilora_ray.search.study.studies import SPACE, check_study, load_study, open_study
from bilora_ray.search.study.study import SearchStudy

TRIAL = {"model_name_or_path": "org/model", "task": "causal-lm", "train_data": "org/data"}
METHODS = {"choice": ["lora", "bilora"]}
FAST, SLOW = {"low": 1e-3, "high": 1e-1, "log": True}, {"low": 1e-5, "high": 1e-4, "log": True}
LORA, BILORA = {"when": {"method": "lora"}}, {"when": {"method": "bilora"}}
SUBSPACES = {
    "learning_rate": [{**FAST, **LORA}, {**SLOW, **BILORA}],
    "lora_alpha": "2 * rank",
    "rank": {"choice": [4, 8]},
    "weight_decay": [{"value": 0.1, **LORA}, {"low": 0, "high": 0.01, **BILORA}],
    "method": METHODS,
    "quantization": {"choice": ["nf4", "int8"], **BILORA},
    "max_grad_norm": {"choice": [0.5, 2.0], "when": {"quantization": "nf4", "rank": [8]}},
}


def load(trial: dict[str, Any], study: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()) -> Space:
    sections = {"study": {"name": "s", "num_trials": 12, **(study or {})}, "trial": {**TRIAL, **trial}}
    given = [f"{name}.{key}={json.dumps(value)}" for name, values in sections.items() for key, value in values.items()]
    return load_space(None, [*given, *overrides])


def load_file(path: Path, trial: dict[str, Any], study: dict[str, Any] | None = None, *overrides: str) -> Space:
    path.write_text(json.dumps({"study": {"name": "s", **(study or {})}, "trial": {**TRIAL, **trial}}))
    return load_space(path, overrides)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    def refused(trial: dict[str, Any], study: dict[str, Any] | None = None, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load_file(tmp_path / "space.yaml", trial, study, *overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{tmp_path / 'space.yaml'}: ")

    return refused


def opened(space: Space, path: Path) -> SearchStudy:
    return open_study(space, Layout(path), {})


def curve(config: TrialConfig) -> list[Metrics]:
    loss = config.learning_rate + config.rank
    return [{"step": s, "max_steps": 3, "eval_loss": loss + 1 / s, "train_runtime": float(s)} for s in (1, 2, 3)]


def searched(space: Space, path: Path) -> SearchStudy:
    study = opened(space, path)
    simulate(study, curve, workers=2)
    study.release()
    return study


def test_the_method_comes_first_and_each_other_after_what_it_depends_on() -> None:
    names = list(load(SUBSPACES).distributions)
    assert names[:3] == ["method", "learning_rate@method=lora", "learning_rate@method=bilora"]
    assert names.index("max_grad_norm") > max(names.index("quantization"), names.index("rank"))


def test_each_method_has_a_space_of_its_own_and_a_trial_says_settings_only(tmp_path: Path) -> None:
    space = load(SUBSPACES, {"num_trials": 16, "sampler": "random"})
    study = searched(space, tmp_path)
    assert {"learning_rate@method=lora", "learning_rate@method=bilora"} < study.study.trials[0].distributions.keys() | {
        name for trial in study.study.trials for name in trial.params
    }
    methods = set()
    for record in study.records():
        settings, sampled = record.settings, record.sampled
        methods.add(settings["method"])
        bilora = settings["method"] == "bilora"
        ends = SLOW if bilora else FAST
        assert ends["low"] <= sampled["learning_rate"] <= ends["high"]
        assert settings["learning_rate"] == sampled["learning_rate"]
        assert settings["lora_alpha"] == 2 * sampled["rank"]
        assert ("weight_decay" in sampled) is bilora
        assert bilora or settings["weight_decay"] == 0.1
        assert ("quantization" in sampled) is bilora
        nested = sampled.get("quantization") == "nf4" and sampled["rank"] == 8
        assert ("max_grad_norm" in sampled) is nested
        assert nested or settings["max_grad_norm"] == 1.0
        assert set(sampled) <= TrialConfig.model_fields.keys() - {"lora_alpha"}
    assert methods == {"lora", "bilora"}


def test_a_study_tells_its_space_again_and_goes_on_with_no_other(tmp_path: Path) -> None:
    space, layout = load(SUBSPACES), Layout(tmp_path)
    study = opened(space, tmp_path)
    study.next_trials()
    study.release()
    shown = load_study(layout, "s").space
    assert (shown.distributions, shown.given, shown.size()) == (space.distributions, space.given, None)
    check_study(space, layout, True, {})
    for changed, key in (
        ({"lora_alpha": "rank"}, "lora_alpha was 2 * rank, is rank"),
        ({"learning_rate": FAST}, "learning_rate was 1e-05 to 0.0001, on a log scale, when method is bilora; 0.001"),
        ({"weight_decay": {"value": 0.1, **LORA}}, "weight_decay was 0 to 0.01, when method is bilora; 0.1, when"),
        ({"max_grad_norm": {"choice": [0.5, 2.0]}}, "max_grad_norm was one of 0.5, 2.0, when quantization is nf4"),
    ):
        with pytest.raises(UserError) as error:
            check_study(load({**SUBSPACES, **changed}), layout, True, {})
        assert f"began with other space: {key}" in str(error.value)
        override = str(error.value).rpartition("--set '")[2].removesuffix("'")
        check_study(load({**SUBSPACES, **changed}, overrides=(override,)), layout, True, {})


def test_a_study_goes_on_with_the_same_space_in_other_words(tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "learning_rate": "3e-4",
        "max_steps": 8,
        "rank": {"choice": [4, 8, 16]},
        "lora_alpha": "2*rank",
        "lora_dropout": {"choice": [0.1, 0.2], "when": {"rank": [8, 4], "method": "bilora"}},
        "rho": [{"value": 0.1, "when": {"rank": 4}}, {"value": 0.2, "when": {"rank": [8, 16]}}],
        "method": METHODS,
    }
    others = {
        "learning_rate": 0.0003,
        "max_steps": "8",
        "lora_alpha": "(2 * rank)",
        "lora_dropout": {"choice": ["0.1", 0.2], "when": {"method": ["bilora"], "rank": [4, 8]}},
        "rho": [{"value": 0.2, "when": {"rank": [16, 8]}}, {"value": "0.1", "when": {"rank": [4]}}],
    }
    points = {"points_to_evaluate": [{"rank": "8"}]}, {"points_to_evaluate": [{"rank": 8}]}
    space, again = load(words, points[0]), load({**words, **others}, points[1])
    study = opened(space, tmp_path)
    study.next_trials()
    study.release()
    check_study(again, Layout(tmp_path), True, {})
    assert space.parts.keys() == again.parts.keys()
    with pytest.raises(
        UserError, match=r"study.points_to_evaluate was \[{'rank': 8}\], is \[{'rank': 4}\]; of a study"
    ):
        check_study(load(words, {"points_to_evaluate": [{"rank": 4}]}), Layout(tmp_path), True, {})
    for key, value in (("max_steps", "9"), ("lora_alpha", "2*rank+0"), ("learning_rate", "3e-5")):
        with pytest.raises(UserError, match=f"began with other space: {key}"):
            check_study(load({**words, **others, key: value}, points[1]), Layout(tmp_path), True, {})


def test_a_study_of_before_conditions_opens_and_goes_on(tmp_path: Path) -> None:
    space, layout = load({"rank": {"choice": [4, 8]}, "rho": {"low": 0.1, "high": 0.9}}), Layout(tmp_path)
    study = opened(space, tmp_path)
    study.next_trials()
    described = study.study.user_attrs[SPACE]
    described["distributions"]["rho"] = {"low": 0.1, "high": 0.9, "log": False, "step": None}
    del described["given"]
    study.study.set_user_attr(SPACE, described)
    study.release()
    check_study(space, layout, True, {})
    assert load_study(layout, "s").space.distributions == space.distributions


def test_points_are_given_in_settings_and_reach_the_sub_space(tmp_path: Path) -> None:
    points = [{"method": "lora", "learning_rate": 0.05, "rank": 8}, {"learning_rate": 2e-5, "method": "bilora"}]
    study = opened(load(SUBSPACES, {"points_to_evaluate": points}), tmp_path)
    study.next_trials()
    study.next_trials()
    first, second = (record.sampled for record in study.records())
    assert {key: first[key] for key in points[0]} == points[0]
    assert {key: second[key] for key in points[1]} == points[1]


def test_an_interrupted_trial_gets_the_rest_of_its_own_sub_space(tmp_path: Path) -> None:
    space = load(SUBSPACES, {"points_to_evaluate": [{"method": "lora", "rank": 8}]})
    study = opened(space, tmp_path)
    study.study.ask()
    study.release()
    again = opened(space, tmp_path)
    assert again.next_trials() == [0]
    assert again.record(0).sampled.keys() == {"method", "rank", "learning_rate"}


def test_set_takes_a_method_out_of_the_search(tmp_path: Path) -> None:
    points = [{"method": "bilora", "quantization": "nf4", "rank": 8}]
    space = load_file(tmp_path / "space.yaml", SUBSPACES, {"points_to_evaluate": points}, "method=lora")
    assert list(space.distributions) == ["learning_rate", "rank"]
    assert space.points_to_evaluate == ({"rank": 8},)
    assert space.trial_config({"learning_rate": 0.05, "rank": 4}).weight_decay == 0.1
    # What one method has alone is no sub-space.
    assert space.distributions["learning_rate"].ends() == (1e-3, 1e-1)


def test_what_no_trial_reads_is_not_searched(tmp_path: Path, refused: Callable[..., str]) -> None:
    trial = {"method": METHODS, "rho": {"low": 0.1, "high": 1}, "num_train_epochs": {"choice": [1, 20]}}
    given = ("method=lora", "max_steps=100")
    space = load_file(tmp_path / "s.yaml", trial, None, *given[:1], "rank={choice: [4, 8]}")
    assert (list(space.distributions), space.size()) == (["num_train_epochs", "rank"], 4)
    assert space.notes == ("rho: is not searched; method lora does not read it",)
    nothing = load_file(tmp_path / "s.yaml", trial, {"points_to_evaluate": [{"rho": 0.5}]}, *given)
    assert (nothing.distributions, nothing.points_to_evaluate, len(nothing.notes)) == ({}, (), 2)
    for changed, override, problem in (
        ({"method": "lora"}, (), "trial.rho: method lora does not read it"),
        ({"method": "full", "rho": 0.1, "rank": {"choice": [4, 8]}}, (), "trial.rank: method full does not read it"),
        ({}, ("method=lora", "rho={low: 0.1, high: 1}"), "--set trial.rho: method lora does not read it"),
        ({"max_steps": {"choice": [8, 9]}}, (), "trial.num_train_epochs: every trial has max_steps instead"),
        ({"rank": {"choice": [8, 8.0]}}, (), "trial.rank: 8 is there twice"),
    ):
        assert problem in refused({**trial, **changed}, None, *override)
    # It is read here: by an expression, and by the trials without steps.
    load({**trial, "max_steps": "10 * num_train_epochs"})
    load({**trial, "max_steps": {"choice": [None, 100]}})


def test_a_study_that_drew_what_no_trial_reads_goes_on(tmp_path: Path) -> None:
    searched = {"rho": {"low": 0.1, "high": 1}, "rank": {"choice": [4, 8]}}
    space, layout = load(searched, overrides=("method=bilora",)), Layout(tmp_path)
    study = opened(space, tmp_path)
    described = study.study.user_attrs[SPACE]
    described["fixed"]["method"] = "lora"
    study.study.set_user_attr(SPACE, described)
    study.next_trials()
    study.release()
    now = load_file(tmp_path / "s.yaml", searched, {"num_trials": 12}, "method=lora")
    check_study(now, layout, True, {})


def test_what_is_derived_from_fixed_settings_is_fixed() -> None:
    assert load({"rank": 4, "lora_alpha": "2 * rank", "split_seed": "seed"}).fixed.items() >= {
        ("lora_alpha", 8),
        ("split_seed", 0),
    }
    assert load({"learning_rate": "3e-4"}).given == {}
    assert load({"rank": {"value": 4}}).fixed["rank"] == 4


@pytest.mark.parametrize(
    ("rank", "problem"),
    [
        ("[8, 16]", "valid integer, got [8, 16]; several values to choose from are {choice: [...]}"),
        ("2024-01-02", "valid integer, got datetime.date(2024, 1, 2)"),
        ("abc", "unable to parse string as an integer, got 'abc'"),
    ],
)
def test_what_others_are_derived_from_is_checked_itself(rank: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load({"lora_alpha": "2 * rank"}, overrides=(f"rank={rank}",))
    assert str(caught.value).startswith("--set trial.rank: should be a")
    assert str(caught.value).endswith(problem)


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid", "qmc", "cmaes"])
def test_steps_are_the_numbers_that_a_condition_names(sampler: str) -> None:
    conditional = {"rank": {"choice": [4, 8], "when": {"lora_dropout": [0.1, 0.3]}}} if sampler != "cmaes" else {}
    step = {"lora_dropout": {"low": 0, "high": 0.5, "step": 0.1}}
    space = load({**step, **conditional}, {"sampler": sampler, "num_trials": 8})
    drawn = [space.sampled(one) for one in proposed(space, 40 if sampler in ("random", "tpe", "qmc") else 8)]
    assert {one["lora_dropout"] for one in drawn} <= {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    if conditional:
        assert {one["lora_dropout"] for one in drawn if "rank" in one} == {0.1, 0.3}
        assert all("rank" in one for one in drawn if one["lora_dropout"] in (0.1, 0.3))


@pytest.mark.parametrize(("whole", "low", "step"), [(False, 0.0, 0.1), (False, 0.1, 0.05), (True, 1.0, None)])
def test_a_range_has_the_same_values_however_they_are_reached(whole: bool, low: float, step: float | None) -> None:
    found = Range(low=low, high=low + (step or 1) * 10, step=step)
    values = found.spread(whole, 11)
    assert (len(values), found.count(whole)) == (11, 11)
    assert list(values) == [found.at(index / 10, whole) for index in range(11)]
    assert list(values) == [found.nearest(low + (step or 1) * index, whole) for index in range(11)]
    assert all(len(repr(value)) <= len("0.35") for value in values)


def test_what_is_derived_may_have_a_condition_and_a_chain() -> None:
    space = load(
        {
            "method": METHODS,
            "rank": {"low": 2, "high": 16},
            "auxiliary_learning_rate": "learning_rate / auxiliary_rank",
            "auxiliary_rank": "max(1, rank // 4)",
            "lora_alpha": {"value": "rank", **LORA},
        }
    )
    bilora = space.trial_config({"method": "bilora", "rank": 9})
    assert (bilora.auxiliary_rank, bilora.auxiliary_learning_rate) == (2, 2.5e-4)
    assert (bilora.lora_alpha, space.trial_config({"method": "lora", "rank": 9}).lora_alpha) == (None, 9)
    # As `rho`, it is of one method.
    assert space.trial_config({"method": "lora", "rank": 9}).auxiliary_rank == 8


@pytest.mark.parametrize(
    ("trial", "size"),
    [
        ({"rank": {"choice": [4, 8, 16]}, "lora_alpha": "2 * rank"}, 3),
        ({"rank": {"low": 2, "high": 16}, "seed": {"low": 0, "high": 8, "step": 4}, "split_seed": 0}, 45),
        ({"method": METHODS, "rank": {"choice": [4, 8]}, "auxiliary_rank": {"choice": [2, 4, 8]}}, 2 + 6),
        ({"method": METHODS, "rank": {"choice": [4, 8], **LORA}}, 2 + 1),
        ({"method": {"choice": ["full", "lora"]}, "rank": {"choice": [4, 8]}}, 1 + 2),
        ({"method": {"choice": ["nbar", "lora"]}, "rank": {"choice": [4, 8]}}, 2 * 2),
        ({"rank": {"low": 1, "high": 9}, "auxiliary_rank": {"low": 1, "high": 4, "when": {"rank": [2, 3]}}}, 8 + 7),
        ({"rank": {"choice": [4, 8]}, "rho": {"low": 0.1, "high": 1}}, None),
        ({}, 1),
    ],
)
def test_the_size_is_the_number_of_different_trials(trial: dict[str, Any], size: int | None) -> None:
    assert load(trial).size() == size


def test_the_ends_of_what_is_derived_are_found_by_what_it_is_computed_from() -> None:
    space = load({"rank": "2 * auxiliary_rank", "auxiliary_rank": {"choice": [16, 2, 8]}})
    assert space.with_end(min, lambda config: config.rank).rank == 4
    deciding = load({"rank": {"low": 2, "high": 16}, "rho": {"low": 0.1, "high": 1, "when": {"rank": 2}}})
    assert deciding.with_end(max, lambda config: config.rank).rank == 16


def test_the_longest_and_the_shortest_step_are_of_trials_that_can_be() -> None:
    space = load(
        {
            "method": METHODS,
            "per_device_train_batch_size": [{"choice": [2, 4], **LORA}, {"choice": [8, 16], **BILORA}],
            "gradient_accumulation_steps": "64 // per_device_train_batch_size",
            "rank": {"choice": [4, 8]},
        }
    )
    assert space.with_step(min).step_rows(1) == space.with_step(max).step_rows(1) == 64
    assert (space.with_step(max).rank, space.first_config().per_device_train_batch_size) == (4, 2)


@pytest.mark.parametrize(
    ("trial", "problem"),
    [
        (
            {"rho": {"value": 1, "when": {"metod": "lora"}}},
            "trial.rho.when: unknown key 'metod'; did you mean 'method'?",
        ),
        (
            {"rho": {"value": 1, "when": {"method": "sam"}}},
            "trial.rho.when.method: should be 'lora', 'bilora'",
        ),
        ({"rho": {"value": 1, "when": {"method": []}}}, "trial.rho: when.method: should have at least 1 item"),
        ({"rank": {"value": 1, **LORA}}, "trial.rank: when method is 'lora': method is never 'lora'; it is 'bilora'"),
        (
            {"rank": {"value": 1, "when": {"seed": [1, 5]}}, "seed": {"low": 0, "high": 4}, "split_seed": 0},
            "trial.rank: when seed is 1 or 5: seed is never 5; it is 0 to 4",
        ),
        (
            {"rank": {"value": 1, "when": {"learning_rate": 0.01}}, "learning_rate": FAST},
            "trial.rank: when learning_rate is 0.01: learning_rate is drawn from a continuous range",
        ),
        (
            {"rank": {"value": 1, "when": {"lora_alpha": 4}}, "lora_alpha": "seed * 2"},
            "trial.rank: when lora_alpha is 4.0: lora_alpha is derived",
        ),
        (
            {"method": METHODS, "rho": {"low": 0.1, "high": 1, **LORA}},
            "trial.rho: no trial has method is lora",
        ),
        (
            {
                "method": METHODS,
                "rank": {"choice": [4, 8], **LORA},
                "seed": {"value": 1, "when": {"rank": 4, **BILORA["when"]}},
            },
            "trial.seed: no trial has rank is 4 and method is bilora",
        ),
        (
            {
                "method": METHODS,
                "rank": [{"value": 4, **LORA}, {"choice": [4, 8], "when": {"method": ["lora", "bilora"]}}],
            },
            "trial.rank: two of its entries hold when method is lora",
        ),
        (
            {
                "prompt_template": {"choice": ["x" * 600, "y"]},
                "rank": [{"choice": [n], "when": {"prompt_template": text}} for n, text in ((4, "x" * 600), (8, "y"))],
            },
            "trial.rank: a condition of over 500 characters is too long",
        ),
        ({"rank": [{"choice": [4]}, {"choice": [8]}]}, "trial.rank: two of its entries have the same condition"),
        ({"rank": [{"value": 4, **BILORA}, 8]}, "trial.rank: a list of cases holds {..., when: ...} only"),
        (
            {"rank": {"choice": [4], "when": {"seed": 0}}, "seed": {"choice": [0], "when": {"rank": 4}}},
            "trial.rank: settings depend on each other in a circle: rank -> seed -> rank",
        ),
        (
            {"rank": "auxiliary_rank", "auxiliary_rank": "rank"},
            "trial.rank: settings depend on each other in a circle: rank -> auxiliary_rank -> rank",
        ),
        ({"rank": "2 * rnk"}, "trial.rank: 2 * rnk has no setting 'rnk'; did you mean 'rank'?"),
        ({"rank": "2 * method"}, "trial.rank: 2 * method computes with method, which is no number"),
        ({"rank": "2 ** (seed"}, "trial.rank: '2 ** (seed' is no expression; it may have numbers"),
        ({"rank": "max_steps + 1"}, "trial.rank: max_steps + 1: max_steps has no value there"),
        (
            {"auxiliary_rank": "rank / 2", "rank": {"low": 2, "high": 5}},
            "trial.auxiliary_rank: rank / 2 with rank 3: should be a valid integer",
        ),
        (
            {"auxiliary_rank": "rank // 4", "rank": {"choice": [16, 2]}},
            "trial.auxiliary_rank: rank // 4 with rank 2: should be greater than or equal to 1, got 0",
        ),
        (
            {"lora_dropout": "rank * rho", "rank": {"low": 1, "high": 8}, "rho": {"low": 0.1, "high": 0.2}},
            "trial.lora_dropout: rank * rho with rank 5, rho 0.2: should be less than 1, got 1",
        ),
        (
            {"lora_alpha": "1 / (rank - 4)", "rank": {"low": 2, "high": 8}},
            "trial.lora_alpha: 1 / (rank - 4) with rank 2: should be greater than 0",
        ),
        ({"max_length": "64 * rank", "rank": {"choice": [4, 8]}}, "trial.max_length: must have one value"),
        ({"task": {"value": "causal-lm", **BILORA}}, "trial.task: must have one value"),
        ({"precision": {"value": "bf16", **LORA}, "method": METHODS}, "trial.precision: auto is the one or the other"),
        ({"seed": {"value": 1, **LORA}, "method": METHODS}, "trial.seed: needs split_seed or validation_data"),
    ],
)
def test_what_could_not_be_tried_is_refused_in_a_line(
    refused: Callable[..., str], trial: dict[str, Any], problem: str
) -> None:
    assert refused(trial).startswith(problem)


@pytest.mark.parametrize(
    ("point", "problem"),
    [
        ({"quantization": "nf4"}, "quantization: has no effect at this point: it is asked for when method is bilora"),
        ({"method": "lora", "quantization": "nf4"}, "quantization: has no effect at this point: it is asked for when"),
        (
            {"learning_rate": 0.05},
            "learning_rate: has no effect at this point: it is asked for when method is lora, or",
        ),
        ({"learning_rate": 0.05, "method": "bilora"}, "learning_rate: 0.05 is outside its distribution, 1e-05 to"),
        ({"method": "lora", "rho": 0.1}, "rho: has no effect at this point: the method does not read it"),
    ],
)
def test_a_point_that_meets_no_condition_is_refused(
    refused: Callable[..., str], point: dict[str, Any], problem: str
) -> None:
    trial = {**SUBSPACES, "rho": {"low": 0.1, "high": 1}}
    assert refused(trial, {"points_to_evaluate": [point]}).startswith(f"study.points_to_evaluate[0].{problem}")


def a_space(draw: random.Random) -> dict[str, Any]:
    """Settings of a trial, right or wrong: conditions, cases and expressions of one another, as they come."""
    whole = {key: draw.choice(({"choice": [1, 2, 4]}, {"low": 1, "high": 6}, 4)) for key in ("rank", "auxiliary_rank")}
    real = {
        key: draw.choice(({"low": 0.1, "high": 0.4}, {"choice": [0.1, 0.2]}, 0.3)) for key in ("rho", "lora_dropout")
    }
    trial: dict[str, Any] = {"method": draw.choice((METHODS, "bilora")), "max_steps": 8, **whole, **real}
    tests = {"method": list(METHOD_NAMES), "rank": [1, 2, 4], "quantization": ["nf4", None], "torch_compile": [True]}
    trial["quantization"], trial["torch_compile"] = {"choice": ["nf4", None]}, {"choice": [True, False]}
    for key in draw.sample(sorted(trial), 4):
        other = draw.choice(sorted(tests))
        when = {other: draw.choice(tests[other])}
        value = trial[key] if isinstance(trial[key], dict) else {"value": trial[key]}
        trial[key] = {**value, "when": when}
        if draw.random() < 0.3:
            trial[key] = [trial[key], {**value, "when": {other: draw.choice(tests[other])}}]
    for key in draw.sample(["lora_alpha", "auxiliary_learning_rate", "per_device_train_batch_size", "lora_dropout"], 2):
        a, b = draw.sample(["rank", "auxiliary_rank", "rho", "lora_dropout", "max_steps"], 2)
        trial[key] = draw.choice((f"{a} * {b}", f"{a} / {b}", f"max({a}, {b}) - 1", f"{a} // 2", f"2 * {a}"))
    return trial


def proposed(space: Space, trials: int) -> Iterator[dict[str, Any]]:
    """What so many trials are proposed, by setting, from a study in memory."""
    study = optuna.create_study()
    for number in range(trials):
        study.ask()
        trial = propose(study, space, number)
        yield space.sampled(trial.params)
        study.tell(trial, float(number % 3))


def test_no_trial_of_a_space_that_is_taken_is_refused() -> None:
    draw, taken, proposals, conditional = random.Random(11), 0, 0, 0
    while proposals < 240:
        sampler = "tpe" if taken < 3 else "random"
        try:
            space = load(a_space(draw), {"num_trials": 12, "sampler": sampler})
        except UserError:
            continue
        taken += 1
        for sampled in proposed(space, 12):
            proposals += 1
            config = space.trial_config(sampled)
            asked = {name for name in space.distributions if space.asked(name, sampled)}
            assert sampled.keys() == space.sampled(dict.fromkeys(asked)).keys()
            assert space.sampled(space.parameters(sampled)) == sampled
            for name in asked:
                drawn, value = space.distributions[name], sampled[setting_of(name)]
                assert drawn.holds(value) if isinstance(drawn, Range) else value in drawn.choice
                conditional += bool(drawn.when)
                for key, allowed in drawn.when.items():
                    assert getattr(config, key) in allowed
    assert conditional >= 60


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"cmaes"}))
def test_each_sampler_proposes_what_can_be(sampler: str) -> None:
    trial = {
        "method": METHODS,
        "learning_rate": [{"choice": [1e-3, 1e-2], **LORA}, {"choice": [1e-4], **BILORA}],
        "rank": {"choice": [4, 8]},
        "quantization": {"choice": ["nf4", "int8"], **BILORA},
        "max_grad_norm": {"choice": [0.5, 2.0], "when": {"quantization": "nf4"}},
    }
    space = load(trial, {"num_trials": 10, "sampler": sampler})
    assert space.size() == 2 * 2 + 2 * (2 + 1)
    found = list(proposed(space, 10))
    for sampled in found:
        bilora = sampled["method"] == "bilora"
        assert (sampled["learning_rate"] == 1e-4, "quantization" in sampled) == (bilora, bilora)
        assert ("max_grad_norm" in sampled) is (sampled.get("quantization") == "nf4")
    if sampler == "grid":
        assert len({json.dumps(sampled, sort_keys=True) for sampled in found}) == space.size()


def test_cma_es_says_which_setting_is_in_its_way() -> None:
    space = load({**SUBSPACES, "rank": {"low": 4, "high": 8}}, {"sampler": "cmaes", "num_trials": 40})
    with pytest.raises(UserError, match=r"trial\.learning_rate some trials have not; write sampler: tpe"):
        check_sampler(space)


def test_a_clone_says_the_same_space(tmp_path: Path) -> None:
    space = load(SUBSPACES, {"points_to_evaluate": [{"method": "lora", "learning_rate": 0.05}]})
    (tmp_path / "clone.yaml").write_text(written(space))
    again = load_space(tmp_path / "clone.yaml")
    assert (again.distributions, again.given, again.fixed) == (space.distributions, space.given, space.fixed)
    assert again.points_to_evaluate == space.points_to_evaluate


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"learning_rate": 0.05}, "learning_rate 0.05 is outside its distribution, .* when method is bilora"),
        (
            {"learning_rate": 0.05, "method": "bilora"},
            "learning_rate 0.05 is outside its distribution, 1e-05 to 0.0001",
        ),
        ({"max_grad_norm": 2.0, "method": "lora"}, "max_grad_norm has no effect where method is lora and rank is 4"),
        ({"lora_alpha": 8.0}, "lora_alpha is not searched"),
    ],
)
def test_what_is_asked_for_must_meet_its_conditions(values: dict[str, Any], problem: str) -> None:
    space = load(SUBSPACES)
    with pytest.raises(UserError, match=problem):
        checked(space, values)
    checked(space, {"method": "lora", "learning_rate": 0.05})


def test_finalists_have_the_settings_of_their_sub_space(tmp_path: Path) -> None:
    study = searched(load(SUBSPACES, {"num_trials": 8}), tmp_path)
    chosen = Chosen((3, 5), (100, 101), 2, 8)
    space = space_of(study, chosen)
    points = [space.trial_config(space.parameters(point)) for point in space.points_to_evaluate]
    assert [point.seed for point in points] == [100, 100, 101, 101]
    for point, number in zip(points, (3, 5, 3, 5), strict=True):
        assert {**study.config(number).model_dump(), "seed": point.seed, "split_seed": 0} == point.model_dump()


def test_the_kinds_of_trials_to_measure_are_trials_that_can_be() -> None:
    space = load({**SUBSPACES, "learning_rate": 1e-3, "weight_decay": 0})
    found = [(kind.chosen.get("method"), kind.chosen.get("quantization")) for kind in kinds(space)]
    assert found == [("lora", None), ("bilora", "nf4"), ("bilora", "int8")]
    assert [kind_of(kinds(space), space.trial_config(kind.low)) for kind in kinds(space)] == kinds(space)


@pytest.mark.slow
def test_one_search_tries_each_method_in_its_own_space_on_real_data(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[2] / "search_spaces" / "methods.yaml"
    short = ("study.num_trials=6", "num_train_epochs=1", "max_train_samples=64", "max_eval_samples=20")
    words = [f"--set={text}" for text in (*short, "study.scheduler=none", "study.sampler=random", "eval_steps=0.5")]
    command = [sys.executable, "-m", "bilora_ray", "tune", f"--space={shipped}", *words, "--json"]
    done = subprocess.run([*command, f"--storage-path={tmp_path}"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["status"] for trial in trials] == ["complete"] * 6
    space, study = load_space(shipped), load_study(Layout(tmp_path), "methods")
    assert {trial["sampled"]["method"] for trial in trials} == {"lora", "bilora"}
    for trial in trials:
        sampled, config = trial["sampled"], study.config(trial["number"])
        bilora = config.method == "bilora"
        assert ("rho" in sampled, "lora_dropout" in sampled, "auxiliary_rank" in sampled) == (bilora, not bilora, False)
        (name,) = [name for name in space.names_of("learning_rate") if space.asked(name, sampled)]
        assert name == f"learning_rate@method={config.method}"
        assert space.distributions[name].holds(sampled["learning_rate"])
        if bilora:
            assert config.auxiliary_rank == max(2, config.rank // 2)
        kept = json.loads((Path(trial["adapter"]) / "adapter_config.json").read_text())
        assert (kept["r"], kept["lora_dropout"]) == (config.rank, config.lora_dropout)


def test_a_warm_start_puts_what_was_best_into_the_sub_space_that_it_is_of(tmp_path: Path) -> None:
    plain = {"rank": {"choice": [4, 8]}, "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}
    for name, method in (("a", "lora"), ("b", "bilora")):
        earlier = opened(load({**plain, "method": method}, {"name": name, "num_trials": 4}), tmp_path)
        simulate(earlier, curve, workers=1)
        earlier.release()
    study = opened(load(SUBSPACES, {"warm_start": ["a", "b"]}), tmp_path)
    taken = {one["study"]: one["settings"] for one in study.study.user_attrs["warm_start"]}
    assert taken["a"].keys() == {"method", "rank", "learning_rate@method=lora"}
    assert taken["b"].keys() == {"method", "rank", "learning_rate@method=bilora"}
    assert FAST["low"] <= taken["a"]["learning_rate@method=lora"] <= FAST["high"]


def test_sources_under_a_condition_are_found_and_kept_as_others_are(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    held_out = {"validation_data": "org/data", "train_data": {"choice": ["a.jsonl", "b.jsonl"]}, "method": METHODS}
    long = {"choice": [4, 8], "when": {"train_data": "b.jsonl"}}
    space = load_file(
        tmp_path / "space.yaml", {**held_out, "rank": [long, {"value": 2, "when": {"train_data": "a.jsonl"}}]}
    )
    a, b = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert space.distributions["rank"].when == {"train_data": (b,)}
    assert space.trial_config({"train_data": a, "method": "lora"}).rank == 2
    moved = space.mapped(lambda key, value: f"/kept{value}" if key == "train_data" else value)
    assert moved.trial_config({"train_data": f"/kept{a}", "method": "lora"}).rank == 2
    assert [moved.asked("rank", {"train_data": f"/kept{one}"}) for one in (a, b)] == [False, True]
