"""Which settings mattered: what is found, what is not made up, and what is said where nothing is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks.importances import search
from bilora_ray.search.space import Choice, Distribution, Range, Value
from bilora_ray.search.study.importances import LEAST_TRIALS, importances_of, shares_of

SPACE: Mapping[str, Distribution] = {
    "method": Choice(choice=("lora", "bilora")),
    "learning_rate": Range(low=1e-5, high=1e-3, log=True),
    "rank": Range(low=2, high=32),
    "rho": Range(low=0.01, high=1, log=True),
}


def drawn(count: int, seed: int = 0) -> list[dict[str, Value]]:
    random = np.random.default_rng(seed)
    settings = []
    for _ in range(count):
        method = str(random.choice(["lora", "bilora"]))
        trial = {"method": method, "learning_rate": 10 ** random.uniform(-5, -3), "rank": int(random.integers(2, 33))}
        settings.append(trial | ({"rho": 10 ** random.uniform(-2, 0)} if method == "bilora" else {}))
    return settings


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 1]).normal(size=count)


def of_learning_rate(settings: Sequence[Mapping[str, Value]]) -> np.ndarray:
    return np.array([(math.log10(float(trial["learning_rate"] or 0)) + 3.7) ** 2 for trial in settings])


def trial(values: Mapping[int, float], state: TrialState, settings: Mapping[str, Value]) -> FrozenTrial:
    """A trial as the study database has it."""
    known: dict[str, BaseDistribution] = {
        "learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
        "per_device_train_batch_size": IntDistribution(1, 64),
    }
    return create_trial(
        state=state,
        value=0.0 if state == TrialState.COMPLETE else None,
        params={key: value for key, value in settings.items() if key in known},
        distributions={key: drawn for key, drawn in known.items() if key in settings},
        intermediate_values=dict(values),
    )


def named(planted: str, studies: int) -> list[list[str]]:
    """What is shown of searches of 12 trials of which most are stopped early, four settings searched."""
    return [list(search(planted, 12, 4, seed).shares) for seed in range(studies)]


def test_noise_names_a_setting_in_few_studies() -> None:
    assert sum(map(bool, named("noise", 20))) <= 2


def test_a_setting_that_decides_is_named_first() -> None:
    assert sum(names[:1] == ["learning_rate"] for names in named("learning_rate", 20)) >= 18


@pytest.mark.slow
@pytest.mark.parametrize("num_settings", [3, 5])
@pytest.mark.parametrize("num_trials", [12, 20, 40])
def test_a_hundred_studies(num_trials: int, num_settings: int) -> None:
    shown = {
        planted: [list(search(planted, num_trials, num_settings, seed).shares) for seed in range(100)]
        for planted in ("noise", "learning_rate")
    }
    assert sum(map(bool, shown["noise"])) <= 10
    assert sum(names[:1] == ["learning_rate"] for names in shown["learning_rate"]) >= 90


def test_the_share_of_a_setting_is_what_it_explains() -> None:
    settings = drawn(400)
    effect = of_learning_rate(settings)
    values = effect / effect.std() * math.sqrt(0.6) + noise(400) * math.sqrt(0.4)
    shares, unknown = shares_of(settings, values.tolist(), SPACE)
    assert (list(shares), unknown) == (["learning_rate"], None)
    assert shares["learning_rate"].share == pytest.approx(0.6, abs=0.06)
    assert 0.5 < shares["learning_rate"].low < shares["learning_rate"].share < shares["learning_rate"].high < 0.7


def test_several_settings_are_named_the_largest_first() -> None:
    settings = drawn(60)
    effect = of_learning_rate(settings)
    ranks = np.array([float(trial["rank"] or 0) for trial in settings])
    values = 1.5 * effect / effect.std() - ranks / ranks.std() + 0.3 * noise(60)
    shares, _ = shares_of(settings, values.tolist(), SPACE)
    assert list(shares) == ["learning_rate", "rank"]
    assert sum(share.share for share in shares.values()) == pytest.approx(0.95, abs=0.04)


def test_a_setting_of_one_method_is_judged_among_its_trials() -> None:
    settings = drawn(60)
    by_method = [1.0 if trial["method"] == "bilora" else 0.0 for trial in settings]
    shares, _ = shares_of(settings, (by_method + 0.1 * noise(60)).tolist(), SPACE)
    assert list(shares) == ["method"]
    by_rho = [math.log10(float(trial["rho"] or 0)) if "rho" in trial else -1.0 for trial in settings]
    shares, _ = shares_of(settings, (by_rho + 0.1 * noise(60)).tolist(), SPACE)
    assert list(shares) == ["rho"]


def test_a_choice_may_hold_nothing() -> None:
    choices: list[Value] = [None, 1.0] * 10
    space = {"max_grad_norm": Choice(choice=(None, 1.0))}
    values = [(choice is None) + 0.1 * value for choice, value in zip(choices, noise(20), strict=True)]
    shares, _ = shares_of([{"max_grad_norm": choice} for choice in choices], values, space)
    assert list(shares) == ["max_grad_norm"]


def test_one_diverged_trial_hides_nothing() -> None:
    settings = drawn(30)
    values = of_learning_rate(settings) + 0.1 * noise(30)
    values[7] = 1e6
    shares, _ = shares_of(settings, values.tolist(), SPACE)
    assert list(shares) == ["learning_rate"]


def test_the_same_trials_give_the_same_numbers() -> None:
    settings = drawn(20)
    values = (of_learning_rate(settings) + 0.1 * noise(20)).tolist()
    assert shares_of(settings, values, SPACE) == shares_of(settings, values, SPACE)


@pytest.mark.parametrize("count", range(LEAST_TRIALS))
def test_too_few_trials_say_nothing(count: int) -> None:
    settings = drawn(count)
    shares, unknown = shares_of(settings, of_learning_rate(settings).tolist(), SPACE)
    assert (shares, unknown) == ({}, f"known from {LEAST_TRIALS} comparable trials on; there are {count}")


def test_what_cannot_be_told_is_not_shown() -> None:
    settings = drawn(20)
    assert shares_of(settings, [0.5] * 20, SPACE) == ({}, "all trials have the same value")
    nothing = "nothing that can be told from noise with 20 trials"
    assert shares_of(settings, noise(20).tolist(), SPACE) == ({}, nothing)
    assert shares_of([{"rank": 8, "learning_rate": 1e-4}] * 20, noise(20).tolist(), SPACE) == ({}, nothing)
    # A quarter of the variance of 20 trials is more than noise, and may be next to none or half.
    effect = of_learning_rate(settings)
    values = effect / effect.std() * 0.6 + noise(20)
    wide = "the interval is wider than the share itself with 20 trials"
    assert shares_of(settings, values.tolist(), SPACE) == ({}, wide)


def test_all_trials_are_compared_after_the_most_rows_that_most_saw() -> None:
    settings = drawn(20)
    values = of_learning_rate(settings)
    trials = []
    for number, (value, given) in enumerate(zip(values, settings, strict=True)):
        if number < 4:  # of no use at any other step: what the rest have not reached is the reverse
            trials.append(trial({5: value, 10: value, 20: -value}, TrialState.COMPLETE, given))
        elif number < 19:
            trials.append(trial({5: 0.0, 10: value}, TrialState.PRUNED, given))
        else:
            trials.append(trial({7: value, 10: math.inf}, TrialState.PRUNED, given))
    found = importances_of(trials, SPACE, lambda _: 8)
    assert (found.rows, found.num_trials, list(found.shares)) == (80, 19, ["learning_rate"])


def test_trials_that_saw_other_numbers_of_rows_are_not_compared() -> None:
    trials = [trial({5 + number % 3: 1.0}, TrialState.PRUNED, given) for number, given in enumerate(drawn(20))]
    found = importances_of(trials, SPACE, lambda _: 8)
    assert (found.rows, found.shares) == (None, {})
    assert found.unknown == "most of the 20 trials that ended were not evaluated after as many training rows"
    assert importances_of([], SPACE, lambda _: 8).unknown == "no trial has ended"


@pytest.mark.parametrize("batches", [(8, 16), (4, 8, 16, 32)])
def test_a_larger_batch_is_compared_after_as_many_rows(batches: tuple[int, ...]) -> None:
    """All that a value depends on is how many rows were seen, so that no setting matters."""
    space = {"per_device_train_batch_size": Choice(choice=batches)}
    trials = []
    for number in range(24):
        size = batches[number % len(batches)]
        steps = range(math.ceil(100 / size), math.ceil(1000 / size) + 1, math.ceil(100 / size))
        values = {step: 1 / (step * size) + 1e-9 * number for step in steps}
        trials.append(trial(values, TrialState.COMPLETE, {"per_device_train_batch_size": size}))
    found = importances_of(trials, space, lambda sampled: int(sampled["per_device_train_batch_size"] or 0))
    assert found.num_trials == 24
    assert found.rows is not None
    assert found.rows >= 900
    # Batches do not divide the rows, by which the values differ a little; never by ten times the rows.
    by_step = importances_of(trials, space, lambda _: 1)
    assert by_step.rows is None or by_step.rows != found.rows
