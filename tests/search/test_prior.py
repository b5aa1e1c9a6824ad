"""What is believed of a range beforehand leads the first trials and fades: right, it helps; wrong, it costs little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import optuna
import pytest

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Prior, Range, Space
from bilora_ray.search.space_file import check_priors, load_space
from bilora_ray.search.study import studies
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import belief, propose

TASK = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "study.name=s")
RATE = "learning_rate={low: 1e-5, high: 1e-1, log: true%s}"
BEST = 1e-3
RIGHT, WRONG = ", prior: {mean: 7e-4, sigma: 2x}", ", prior: {mean: 1e-1, sigma: 2x}"
PRIORS = {"none": "", "right": RIGHT, "wrong": WRONG}


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "open_storage", lambda _: optuna.storages.InMemoryStorage())
    monkeypatch.setattr(studies, "Looks", lambda storage: storage)


def space_of(*overrides: str) -> Space:
    return load_space(None, [*TASK, *overrides])


@pytest.mark.parametrize(
    ("prior", "line"),
    [
        ("{mean: 2, sigma: 2x}", "prior: mean must be from low 0.01 to high 1, got 2"),
        ("{mean: 0.1, sigma: 0.05}", "prior: sigma of a log range must be a factor such as 2x, got 0.05"),
        ("{mean: 0.1, sigma: 1x}", "prior.sigma: a factor must be more than 1x, got '1x'"),
        ("{mean: 0.1, sigma: 2y}", "prior.sigma: must be a number, or a factor such as 2x, got '2y'"),
        ("{mean: 0.1}", "'prior.sigma' is missing"),
        ("{mean: 0.1, sigma: 2x, median: 3}", "unknown key 'prior.median'"),
    ],
)
def test_a_prior_that_cannot_be_is_refused(prior: str, line: str) -> None:
    with pytest.raises(UserError, match="rho: ") as raised:
        space_of(f"rho={{low: 0.01, high: 1, log: true, prior: {prior}}}")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sigma", "line"),
    [("2x", "sigma 2x is a factor, which needs log: true"), (0, "must be more than 0"), (-1.0, "must be more than 0")],
)
def test_a_prior_on_a_linear_scale_has_a_number(sigma: object, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(Range, {"low": 0, "high": 1, "prior": {"mean": 0.5, "sigma": sigma}}, "here")
    assert Prior(mean=0.5, sigma="0.1") == Prior(mean=0.5, sigma=0.1)


def test_a_range_says_what_is_believed_of_it() -> None:
    space = space_of("rho={low: 0.01, high: 1, log: true, prior: {mean: 0.05, sigma: 2x}}")
    assert str(space.distributions["rho"]) == "0.01 to 1, on a log scale, believed to be within a factor of 2 of 0.05"


@pytest.mark.parametrize("sampler", ["grid", "qmc", "cmaes"])
def test_samplers_that_have_their_trials_without_it_refuse_a_prior(sampler: str) -> None:
    space = space_of(RATE % RIGHT)
    wanted = replace(space, study=space.study.model_copy(update={"sampler": sampler}))
    with pytest.raises(UserError, match=f"trial.learning_rate: {sampler} .* prior"):
        check_priors(wanted)


def test_a_study_keeps_its_priors_and_one_without_goes_on(tmp_path: Path) -> None:
    believed, plain = space_of(RATE % RIGHT), space_of(RATE % "")
    kept = studies._described(believed)["distributions"]["learning_rate"]
    assert kept["prior"] == {"mean": 7e-4, "sigma": "2x"}
    assert studies._distribution(kept) == believed.distributions["learning_rate"]
    # A study of before there were priors.
    before = studies._described(plain)
    before["distributions"]["learning_rate"] = {"low": 1e-5, "high": 1e-1, "log": True, "step": None}
    assert studies._comparable(before) == studies._comparable(studies._described(plain))
    assert studies._comparable(before) != studies._comparable(studies._described(believed))
    assert studies._as_it_was("learning_rate", [kept]).endswith(', prior: {"mean": 0.0007, "sigma": "2x"}}\'')


def drawn(found: Range, key: str, count: int = 2000) -> np.ndarray:
    return np.array([belief._near(key, found, (place + 0.5) / count) for place in range(count)])


def test_draws_are_those_of_the_normal_between_the_ends() -> None:
    values = drawn(Range(low=0.01, high=1, log=True, prior=Prior(mean=0.05, sigma="2x")), "rho")
    normal = NormalDist(math.log(0.05), math.log(2))
    within = normal.cdf(math.log(1)) - normal.cdf(math.log(0.01))
    for quantile in (0.1, 0.5, 0.9):
        expected = normal.inv_cdf(normal.cdf(math.log(0.01)) + quantile * within)
        assert np.quantile(np.log(values), quantile) == pytest.approx(expected, abs=0.02)
    at_the_end = drawn(Range(low=0.01, high=1, log=True, prior=Prior(mean=1, sigma="2x")), "rho")
    assert 0.01 <= at_the_end.min() < at_the_end.max() <= 1
    assert np.median(at_the_end) == pytest.approx(1 / 2**0.674, rel=0.02)
    whole = drawn(Range(low=2, high=16, step=2, prior=Prior(mean=6, sigma=3)), "rank")
    assert set(whole) == {2, 4, 6, 8, 10, 12, 14, 16}
    assert all(type(value) is int for value in whole.tolist())


def test_a_trial_draws_the_same_whenever_it_is_proposed_and_the_first_is_the_mean() -> None:
    space = space_of(
        RATE % RIGHT, "rho={low: 0.01, high: 1, log: true, prior: {mean: 0.05, sigma: 2x}}", "study.seed=3"
    )

    def proposed() -> list[dict[str, float]]:
        study = optuna.create_study()
        for number in range(20):
            study.ask()
            propose(study, space, number)
        return [trial.params for trial in study.trials]

    assert proposed() == proposed()
    assert proposed()[0] == {"learning_rate": pytest.approx(7e-4), "rho": pytest.approx(0.05)}


def test_the_belief_fades() -> None:
    spaces = [space_of(RATE % RIGHT, f"study.seed={seed}") for seed in range(40)]
    shares = [np.mean([belief.believes(space, number) for space in spaces]) for number in range(120)]
    assert shares[0] == 1
    assert np.mean(shares[1:6]) == pytest.approx(0.61, abs=0.1)
    assert np.mean(shares[10:15]) == pytest.approx(0.33, abs=0.1)
    assert np.mean(shares[80:]) < 0.01


def curve(config: TrialConfig) -> Sequence[Metrics]:
    """A loss that falls to what the learning rate and the radius decide."""
    distance = abs(math.log10(config.learning_rate / BEST)) + 0.5 * abs(math.log10(config.rho / 0.1))
    return [
        {"step": step, "max_steps": 9, "eval_loss": distance + 1 / step, "train_runtime": float(step)}
        for step in range(1, 10)
    ]


def distance(path: Path, prior: str, sampler: str, seed: int, num_trials: int) -> float:
    """How far the best trial of a search is from the best there is."""
    study = (f"study.num_trials={num_trials}", f"study.sampler={sampler}", f"study.seed={seed}", "study.scheduler=none")
    space = space_of(RATE % PRIORS[prior], "rho={low: 0.01, high: 1, log: true}", *study)
    opened = studies.open_study(space, Layout(path / f"{prior}-{sampler}-{seed}-{num_trials}"), {})
    moments = simulate(opened, curve)
    opened.release()
    return min(moment.metrics["eval_loss"] for moment in moments if moment.metrics["step"] == 9) - 1 / 9


def median(path: Path, prior: str, num_trials: int, sampler: str = "tpe", searches: int = 12) -> float:
    return float(np.median([distance(path, prior, sampler, seed, num_trials) for seed in range(searches)]))


def test_a_right_prior_helps(tmp_path: Path) -> None:
    assert median(tmp_path, "right", 12) < 0.8 * median(tmp_path, "none", 12)


def test_a_prior_two_decades_off_is_recovered_from(tmp_path: Path) -> None:
    assert 2 - median(tmp_path, "wrong", 1) < 0.3  # where its first trial is
    assert median(tmp_path, "wrong", 30, searches=8) < median(tmp_path, "none", 30, searches=8) + 0.15


def test_random_search_draws_from_a_prior_too(tmp_path: Path) -> None:
    assert median(tmp_path, "right", 12, "random") < 0.85 * median(tmp_path, "none", 12, "random")
