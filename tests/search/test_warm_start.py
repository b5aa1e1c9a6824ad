"""A study that begins with what was best in earlier ones: what is taken, what it refuses, what it gains and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from click.testing import CliRunner
from optuna.samplers import RandomSampler

from bilora_ray.cli import tune
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.library import searching
from bilora_ray.search.simulated import Curve, Metrics, Moment, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study import studies
from bilora_ray.search.study.control.evaluations import best_first
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.samplers import belief, propose
from bilora_ray.search.study.studies import check_study, load_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.warm_start import first_points, in_words, taken

TASK = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data")
SPACE = (
    "rank={choice: [4, 8, 16]}",
    "rho={low: 0.01, high: 1, log: true}",
    "learning_rate={low: 1e-5, high: 1e-2, log: true}",
)


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A storage path whose database is memory, of which several studies know."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(studies, "open_storage", lambda _: storage)
    monkeypatch.setattr(studies, "Looks", lambda storage: storage)
    monkeypatch.setattr(studies, "read_storage", lambda _: storage)
    monkeypatch.setattr(studies, "study_names", lambda _: optuna.get_all_study_names(storage))
    return Layout(tmp_path)


def curve_of(rate: float, rho: float, rank: int) -> Curve:
    """A task that is best at these settings."""

    def curve(config: TrialConfig) -> Sequence[Metrics]:
        off = abs(math.log10(config.learning_rate / rate)) + 0.5 * abs(math.log10(config.rho / rho))
        off += 0.1 * abs(math.log2(config.rank / rank))
        seconds = range(1, 10)
        return [{"step": s, "max_steps": 9, "eval_loss": off + 1 / s, "train_runtime": float(s)} for s in seconds]

    return curve


OLD, RELATED, UNRELATED = curve_of(3e-4, 0.1, 8), curve_of(4e-4, 0.07, 8), curve_of(5e-3, 0.9, 4)


def begun(layout: Layout, name: str, *overrides: str, space: Sequence[str] = SPACE) -> SearchStudy:
    loaded = load_space(None, [*TASK, *space, f"study.name={name}", *overrides])
    check_study(loaded, layout, resume=False, digests={})
    return open_study(loaded, layout, {})


def searched(layout: Layout, name: str, curve: Curve, *overrides: str, space: Sequence[str] = SPACE) -> list[Moment]:
    study = begun(layout, name, *overrides, space=space)
    moments = simulate(study, curve)
    study.release()
    return moments


def test_the_best_of_each_source_are_taken_as_they_fit(layout: Layout) -> None:
    searched(layout, "old", OLD, "study.num_trials=20")
    narrow = ("rank={choice: [8, 32]}", "learning_rate={low: 1e-3, high: 1e-2, log: true}", "rho=0.2")
    warm = begun(layout, "new", "study.warm_start=[old]", space=narrow).warm_start
    assert 4 <= len(warm) <= 5
    old = layout_study("old")
    ranked = best_first(old, old.trials)
    assert [one["trial"] for one in warm] == [trial.number for trial in ranked[: len(warm)]]
    for one, trial in zip(warm, ranked, strict=False):
        assert one["study"] == "old"
        assert "rho" not in one["settings"]  # it is not searched here
        assert one["settings"]["learning_rate"] == max(1e-3, trial.params["learning_rate"])
        assert one["settings"].get("rank") == (8 if trial.params["rank"] == 8 else None)
    assert in_words(warm).startswith(f"warm start from {len(warm)} of the best trials of 'old': ")
    assert in_words([]) == ""


def layout_study(name: str) -> optuna.Study:
    return studies._read(Layout(Path("/")), name)


def test_their_points_run_first_after_the_users(layout: Layout) -> None:
    searched(layout, "a", OLD, "study.num_trials=12")
    searched(layout, "b", RELATED, "study.num_trials=12", "study.seed=1")
    point = "study.points_to_evaluate=[{rank: 4, rho: 0.5, learning_rate: 2e-3}]"
    study = begun(layout, "c", "study.warm_start=[a, b]", point)
    numbers = [study.next_trials()[0] for _ in range(3)]
    found = [study.study.trials[number].params for number in numbers]
    assert found[0] == {"rank": 4, "rho": 0.5, "learning_rate": 2e-3}
    best = [best_first(layout_study(name), layout_study(name).trials)[0].params for name in "ab"]
    assert found[1:] == best == first_points(study.warm_start)


def test_what_was_taken_stays_whatever_becomes_of_the_source(layout: Layout) -> None:
    searched(layout, "old", OLD, "study.num_trials=12")

    def run(name: str, between: Callable[[], object]) -> list[dict[str, object]]:
        study = begun(layout, name, "study.warm_start=[old]", "study.num_trials=10")
        first = study.next_trials()
        between()
        study.release()
        again = load_space(None, [*TASK, *SPACE, f"study.name={name}", "study.warm_start=[old]", "study.num_trials=10"])
        check_study(again, layout, resume=True, digests={})
        resumed = open_study(again, layout, {})
        assert first == [0]
        simulate(resumed, RELATED, workers=1)
        resumed.release()
        return [trial.params for trial in resumed.study.trials]

    kept = run("x", lambda: None)
    storage = layout_study("old")._storage
    assert run("y", lambda: optuna.delete_study(study_name="old", storage=storage)) == kept
    shown = load_study(layout, "y").warm_start
    assert shown == load_study(layout, "x").warm_start != []


def test_a_source_that_cannot_be_one_is_refused(layout: Layout) -> None:
    searched(layout, "old", OLD, "study.num_trials=4")
    begun(layout, "empty").release()
    for name, space, line in (
        ("olf", SPACE, "--warm-start olf: not in .*did you mean 'old'"),
        ("new", SPACE, "--warm-start new: is the study itself"),
        ("empty", SPACE, "--warm-start empty: none of its trials has measured anything"),
        ("old", ["warmup_ratio={low: 0, high: 0.1}"], r"--warm-start old: none of its settings \(rank, rho"),
    ):
        with pytest.raises(UserError, match=line):
            begun(layout, "new", f"study.warm_start=[{name}]", space=space)
        assert "new" not in studies.study_names(layout)
    searched(layout, "more", OLD, "study.num_trials=2")
    changed = load_space(None, [*TASK, *SPACE, "study.name=more", "study.num_trials=2", "study.warm_start=[old]"])
    with pytest.raises(UserError, match=r"study\.warm_start was .*, is \['old'\]"):
        check_study(changed, layout, resume=True, digests={})


@pytest.mark.parametrize("sampler", ["grid", "qmc", "cmaes"])
def test_samplers_that_have_their_trials_without_it_refuse_it(sampler: str) -> None:
    from bilora_ray.search.space_file import check_priors

    space = load_space(None, [*TASK, *SPACE, "study.name=s", "study.warm_start=[old]"])
    study = SimpleNamespace(sampler=sampler, warm_start=("old",))
    with pytest.raises(UserError, match=f"study.warm_start: {sampler} heeds no earlier study"):
        check_priors(SimpleNamespace(**{**vars(space), "study": study}))  # type: ignore[arg-type]


def test_sources_are_ranked_by_their_own_metric_alone() -> None:
    """A loss and an accuracy, stopped trials and failed ones, and several objectives."""
    space = load_space(None, [*TASK, *SPACE, "study.name=s"])
    ranges = {"rho": optuna.distributions.FloatDistribution(0.01, 1, log=True)}

    def source(name: str, directions: list[str], values: list[list[float]]) -> optuna.Study:
        study = optuna.create_study(study_name=name, directions=directions)
        for place, value in enumerate(values):
            trial = optuna.trial.create_trial(params={"rho": 0.1 + place / 10}, distributions=ranges, values=value)
            study.add_trial(trial)
        return study

    lower = source("loss", ["minimize"], [[3.0], [1.0], [2.0], [4.0]])
    higher = source("accuracy", ["maximize"], [[0.3], [0.1], [0.9], [0.4]])
    several = source("both", ["minimize", "maximize"], [[3.0, 0.5], [1.0, 0.9], [2.0, 0.8], [4.0, 0.1]])
    warm = taken([lower, higher, several], space)
    assert [(one["study"], one["trial"]) for one in warm] == [("loss", 1), ("accuracy", 2), ("both", 1)]
    assert first_points(warm) == [{"rho": pytest.approx(0.2)}, {"rho": pytest.approx(0.3)}]


def test_the_belief_has_no_say_where_its_trials_do_no_better() -> None:
    space = load_space(None, [*TASK, *SPACE, "study.name=s"])

    def study_of(believed: float, other: float, number_of: int = 16) -> optuna.Study:
        study = optuna.create_study()
        for number in range(number_of):
            drawn = belief.believes(space, number)
            told = {belief.DRAWN: drawn}
            study.add_trial(optuna.trial.create_trial(value=believed if drawn else other, system_attrs=told))
        return study

    assert not belief.refuted(study_of(1.0, 0.5, 5))
    worse, better = study_of(1.0, 0.5), study_of(0.5, 1.0)
    assert belief.refuted(worse)
    assert not belief.refuted(better)
    # What a person asked for, or a source began with, is neither; and what was not drawn from it once it was refuted is
    # no more than another proposal.
    for value, attributes in (
        (2.0, {belief.DRAWN: False, "fixed_params": {"rho": 0.1}}),
        (0.1, {belief.DRAWN: True, "fixed_params": {"rho": 0.1}}),
        (0.4, {belief.DRAWN: False}),
    ):
        for _ in range(20):
            worse.add_trial(optuna.trial.create_trial(value=value, system_attrs=attributes))
    assert belief.refuted(worse)


def test_what_a_trial_draws_from_stays_though_it_is_refuted_since() -> None:
    priors = ("rho={low: 0.01, high: 1, log: true, prior: {mean: 0.1, sigma: 2x}}", SPACE[2], "study.name=s")
    space = load_space(None, [*TASK, *priors])
    study, rho = optuna.create_study(), optuna.distributions.FloatDistribution(0.01, 1, log=True)
    study.ask()
    assert propose(study, space, 0).params["rho"] == pytest.approx(0.1)
    for value in (0.5, 0.6, 0.7, 1.0, 1.1, 1.2):
        told = {belief.DRAWN: value >= 1}
        study.add_trial(
            optuna.trial.create_trial(value=value, params={"rho": 0.5}, distributions={"rho": rho}, system_attrs=told)
        )
    assert belief.refuted(study)
    assert belief.with_belief(RandomSampler(), study, space, 0)._values["rho"] == pytest.approx(0.1)  # type: ignore[attr-defined]
    later = study.ask().number
    propose(study, space, later)
    assert study.trials[later].system_attrs[belief.DRAWN] is False


def test_what_all_trials_of_a_source_shared_is_taken_where_it_is_searched_here(layout: Layout) -> None:
    fixed = ("method=lora", "learning_rate={low: 1e-5, high: 1e-2, log: true}", "rank=8")
    searched(layout, "old", OLD, "study.num_trials=8", space=fixed)
    searched(layout, "plain", OLD, "study.num_trials=8", space=SPACE)  # whose method is its default
    wide = (*SPACE[1:], "rank={choice: [4, 8]}", "method={choice: [bilora, lora]}")
    study = begun(layout, "new", "study.warm_start=[old, plain]", space=wide)
    first, second = first_points(study.warm_start)
    assert (first["method"], first["rank"], first.keys()) == ("lora", 8, {"method", "learning_rate", "rank"})
    assert (second["method"], "rho" in second) == ("bilora", True)
    assert [study.next_trials(), study.next_trials()] == [[0], [1]]
    assert study.config(1).method == "lora"
    with pytest.raises(UserError, match="--warm-start old: none of its settings"):  # but by itself it is no finding
        begun(layout, "other", "study.warm_start=[old]", space=("method={choice: [bilora, lora]}",))


def test_a_related_study_helps_and_an_unrelated_one_does_not_mislead(layout: Layout) -> None:
    """The mean distance from the best after a few trials; `benchmarks/warm_start.py` tells more of many searches."""
    searched(layout, "old", OLD, "study.num_trials=30", "study.seed=9")

    def distance(task: str, curve: Curve, num_trials: int, *source: str) -> float:
        found = []
        for seed in range(8):
            study = (f"study.num_trials={num_trials}", f"study.seed={seed}", "study.scheduler=none", *source)
            told = searched(layout, f"{task}-{len(source)}-{seed}", curve, *study)
            found.append(min(one.metrics["eval_loss"] for one in told if one.metrics["step"] == 9) - 1 / 9)
        return float(np.mean(found))

    warm = "study.warm_start=[old]"
    assert distance("related", RELATED, 6, warm) < 0.85 * distance("related", RELATED, 6)
    assert distance("unrelated", UNRELATED, 30, warm) < distance("unrelated", UNRELATED, 30) + 0.1


def test_the_option_names_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stop(path: Path, overrides: Sequence[str], *_: object) -> None:
        seen.extend(overrides)
        raise UserError("seen")

    monkeypatch.setattr(searching, "space_to_search", stop)
    CliRunner().invoke(tune.command, ["--space", "x.yaml", "--set", "rho=0.1", "--warm-start", "a,b"])
    assert seen == ["rho=0.1", 'study.warm_start=["a", "b"]']
    assert load_space(None, [*TASK, *SPACE, "study.name=s", *seen[1:]]).study.warm_start == ("a", "b")
