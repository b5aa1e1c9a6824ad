"""Finalists: chosen at equal evidence, trained on fresh seeds, and reported without the luck that picked them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from tiny_trials import Tiny, evaluate_adapter, write_rows

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.files import is_held
from bilora_ray.records import Objective
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import (
    begin,
    by_evidence,
    check_finalists,
    choose,
    chosen_of,
    finals_of,
    keep_test,
    space_of,
)
from bilora_ray.search.study.control.verdict import Verdict, judge
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.storage import running_study, study_names
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.search.study.study import SearchStudy

LOSS = Objective("eval_loss", greater_is_better=False)
TRIAL = {"model_name_or_path": "org/model", "task": "causal-lm", "train_data": "org/data"}
NOISE = 0.1


def space(**given: Any) -> Space:
    study = {"name": "s", "num_trials": 8, "scheduler": "none", "sampler": "random", "finalists": 3}
    trial = {**TRIAL, "rho": "{low: 0.1, high: 0.9}"}
    sections = {"study": study, "trial": trial}
    for key, value in given.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    pairs = [(section, key, value) for section, values in sections.items() for key, value in values.items()]
    return load_space(None, [f"{section}.{key}={value}" for section, key, value in pairs])


def curve(config: TrialConfig) -> list[Metrics]:
    """Two evaluations; the loss is the radius, with the noise of the seed and the settings."""
    noise = NOISE * Random(f"{config.rho} {config.seed}").gauss()
    return [{"step": s, "max_steps": 2, "eval_loss": config.rho + noise, "train_runtime": float(s)} for s in (1, 2)]


def searched(layout: Layout, space: Space, curve: Callable[[TrialConfig], Sequence[Metrics]] = curve) -> SearchStudy:
    study = open_study(space, layout, {})
    simulate(study, curve, workers=2)
    study.release()
    return study


def trained(study: SearchStudy, workers: int = 3) -> SearchStudy:
    """The finalists' study, run to its end."""
    begun = begin(study, {})
    assert begun is not None
    finals = open_study(begun[0], study.layout, {})
    simulate(finals, curve, workers)
    finals.release()
    return finals


def told(study: SearchStudy) -> Verdict:
    finals = finals_of(study)
    assert finals is not None
    assert finals.verdict is not None
    return finals.verdict


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def test_the_best_trials_are_trained_on_the_same_fresh_seeds_and_held_out_rows(layout: Layout) -> None:
    study = searched(layout, space(trial__seed=7))
    finals = trained(study)
    ranked = [record.number for record in study.objective.ranked(study.records())]
    configs = [finals.config(record.number) for record in finals.records()]
    by_rho: dict[float, set[int]] = {}
    for config in configs:
        by_rho.setdefault(config.rho, set()).add(config.seed)
    assert set(by_rho) == {study.config(number).rho for number in ranked[:3]}
    (seeds,) = {frozenset(found) for found in by_rho.values()}
    assert len(seeds) == 3
    assert 7 not in seeds
    assert {config.resolved_split_seed for config in configs} == {7}
    assert len(configs) == 9
    assert finals.finished()


def test_where_seeds_are_searched_each_finalist_keeps_its_rows(layout: Layout) -> None:
    given = {"trial__seed": "{choice: [1, 2, 3, 4]}", "trial__validation_data": "org/other"}
    study = searched(layout, space(**given))
    finals, chosen = trained(study), chosen_of(study)
    assert chosen is not None
    splits = {study.config(number).rho: study.config(number).seed for number in chosen.trials}
    assert len(set(splits.values())) > 1
    for record in finals.records():
        config = finals.config(record.number)
        assert config.resolved_split_seed == splits[config.rho]
        assert config.seed not in (1, 2, 3, 4)


def test_a_resume_goes_on_with_what_was_chosen(layout: Layout) -> None:
    study = searched(layout, space())
    chosen = choose(study)
    # Killed here; then again amid the finalists' second trial.
    first, begun = begin(study, {}) or (None, None)
    assert first is not None
    assert begun is False
    finals = open_study(first, layout, {})
    for number in (*finals.next_trials(), *finals.next_trials()):
        for metrics in curve(finals.config(number))[: 2 - number]:
            finals.report(number, metrics)
    finals.release()
    again, begun = begin(study, {}) or (None, None)
    assert again is not None
    assert begun is True
    assert again.points_to_evaluate == first.points_to_evaluate
    resumed = open_study(again, layout, {})
    simulate(resumed, curve, 2)
    resumed.release()
    assert chosen_of(load_study(layout, "s")) == chosen
    assert [record.number for record in resumed.records()] == list(range(9))
    assert {(c.rho, c.seed) for c in map(resumed.config, range(9))} == {
        (study.config(number).rho, seed) for number in chosen.trials for seed in chosen.seeds
    }


def test_a_longer_search_adds_finalists_to_those_there_were(layout: Layout) -> None:
    study = searched(layout, space())
    trained(study)
    before = chosen_of(study)
    longer = searched(layout, space(study__num_trials=30))
    finals, after = trained(longer), chosen_of(longer)
    assert before is not None
    assert after is not None
    assert after.trials[:3] == before.trials
    assert len(after.trials) > 3
    assert after.seeds == before.seeds
    assert len(finals.records()) == 3 * len(after.trials)


def test_equal_settings_are_one_finalist(layout: Layout) -> None:
    study = searched(layout, space(trial__rho="{choice: [0.1, 0.2]}"))
    chosen = choose(study)
    assert sorted(study.config(number).rho for number in chosen.trials) == [0.1, 0.2]


def test_a_trial_that_was_stopped_is_a_finalist_if_it_was_ahead_at_equal_rows(layout: Layout) -> None:
    losses = {0: [5.0, 5.0, 1.0], 1: [4.0, 4.0, 2.0], 2: [3.0, 3.0], 3: [4.5, 4.4], 4: [6.0]}
    study = open_study(space(study__num_trials=5, study__scheduler="asha", study__grace_period=1), layout, {})
    for number, values in losses.items():
        assert study.next_trials() == [number]
        for step, value in enumerate(values, start=1):
            study._live[number].report(value, step)
        study._end(number, *_ending(values))
    study.release()
    # 2 was ahead of both complete ones, 3 ahead of the best and behind the second, 4 behind both.
    assert by_evidence(study) == [2, 0, 1, 3, 4]


def test_a_trial_that_breaks_a_limit_is_no_finalist_and_one_that_keeps_it_is(layout: Layout) -> None:
    asked = {"study__num_trials": 4, "study__scheduler": "asha", "study__grace_period": 1, "study__max_adapter_mb": 10}
    study = open_study(space(**asked), layout, {})
    losses = ([5.0, 5.0, 4.0], [1.0], [3.0, 3.0, 3.0], [9.0])
    for number, (values, size) in enumerate(zip(losses, (9.0, 12.0, 9.0, 9.0), strict=True)):
        assert study.next_trials() == [number]
        for step, value in enumerate(values, start=1):
            study.report(number, {"step": step, "max_steps": 3, "eval_loss": value, "adapter_mb": size})
    study.release()
    assert [record.status.value for record in study.records()] == ["complete", "pruned", "complete", "pruned"]
    assert by_evidence(study) == [2, 0, 3]


def _ending(values: list[float]) -> tuple[Any, ...]:
    from optuna.trial import TrialState

    return (TrialState.COMPLETE, min(values)) if len(values) == 3 else (TrialState.PRUNED,)


def test_the_score_of_each_seed_is_of_who_the_other_seeds_pick() -> None:
    scores = {4: [1.0, 1.0, 4.0], 9: [2.0, 2.0, 2.0]}
    verdict = judge({4: 0.5, 9: 1.5}, scores, LOSS)
    assert verdict is not None
    # Equal means: without seed 0 or 1 the others pick 9; without seed 2 they pick 4, which has 4.0 there.
    assert verdict.score == pytest.approx((2.0 + 2.0 + 4.0) / 3)
    assert [finalist.trial for finalist in verdict.finalists] == [4, 9]
    assert verdict.fell == pytest.approx(verdict.score - 0.5)
    assert verdict.winner.fell == pytest.approx(2.0 - 0.5)
    assert verdict.winner.median_seed in (0, 1)


def test_an_interval_holds_nothing_that_the_metric_cannot_be() -> None:
    verdict = judge({1: 0.6}, {1: [0.6, 0.9]}, Objective("eval_accuracy", greater_is_better=True))
    assert verdict is not None
    assert (verdict.low, verdict.high) == (0.0, 1.0)
    assert (verdict.winner.low, verdict.winner.high) == (0.0, 1.0)


def test_where_more_is_better_all_is_mirrored() -> None:
    scores = {1: [0.3, 0.1, 0.25, 0.4], 2: [0.2, 0.2, 0.3, 0.2], 3: [0.25, 0.3, 0.1, 0.1]}
    mirrored = {trial: [-score for score in told] for trial, told in scores.items()}
    less = judge(dict.fromkeys(scores, -0.5), mirrored, LOSS)
    more = judge(dict.fromkeys(scores, 0.5), scores, Objective("reward", greater_is_better=True))
    assert less is not None
    assert more is not None
    assert less.low is not None
    assert less.high is not None
    assert (more.score, more.low, more.high) == pytest.approx((-less.score, -less.high, -less.low))
    assert more.fell == pytest.approx(less.fell)
    assert (more.fell or 0) > 0
    assert [f.trial for f in more.finalists] == [f.trial for f in less.finalists]


def test_who_fails_on_a_seed_loses_to_who_does_not() -> None:
    verdict = judge({1: 0.1, 2: 0.2}, {1: [0.1, None, 0.1], 2: [0.5, 0.6, 0.4]}, LOSS)
    assert verdict is not None
    assert verdict.winner.trial == 2
    assert verdict.score == pytest.approx(0.5)
    assert judge({1: 0.1}, {1: [None, None]}, LOSS) is None


def test_the_winners_score_is_unbiased_and_the_single_run_is_not() -> None:
    """Ten equal settings and their noise: whoever is picked is worth the same, and the search thinks otherwise."""
    random, score, mean, single, inside = Random(0), [], [], [], 0
    for _ in range(400):
        search = {trial: random.gauss() for trial in range(10)}
        best = sorted(search, key=lambda trial: search[trial])[:3]
        verdict = judge(search, {trial: [random.gauss() for _ in range(3)] for trial in best}, LOSS)
        assert verdict is not None
        assert verdict.low is not None
        assert verdict.high is not None
        score.append(verdict.score)
        mean.append(verdict.winner.mean)
        single.append(min(search.values()))
        inside += verdict.low <= 0.0 <= verdict.high
    assert abs(fmean(score)) < 0.1 < 0.4 < -fmean(mean)
    assert fmean(single) < -1.4
    assert inside >= 0.95 * 400


def test_what_is_said_of_a_search_is_of_its_finalists(layout: Layout) -> None:
    study = searched(layout, space())
    assert finals_of(study) is None
    trained(study)
    verdict, finals = told(study), finals_of(study)
    assert finals is not None
    assert finals.winner is not None
    winner = verdict.winner
    assert finals.winner.value == sorted(score for score in winner.scores if score is not None)[1]
    assert finals.study.config(finals.winner.number).rho == study.config(winner.trial).rho
    assert winner.single == study.record(winner.trial).value


def test_finalists_that_cannot_be_are_refused_before_anything_starts(layout: Layout) -> None:
    with pytest.raises(UserError, match="finalist_seeds: there are no finalists"):
        space(study__finalists=0, study__finalist_seeds=3)
    with pytest.raises(UserError, match="too long for the study of its finalists"):
        space(study__name="n" * 95)
    with pytest.raises(UserError, match="finalists: are of one objective"):
        space(study__objectives="[{metric: eval_loss}, {metric: train_runtime}]")
    study = searched(layout, space())
    choose(study)
    check_finalists(space(), layout)
    with pytest.raises(UserError, match="its finalists were chosen with finalists: 3 and finalist_seeds: 3"):
        check_finalists(space(study__finalists=2), layout)
    searched(layout, space(study__name="t-finalists", study__finalists=0))
    with pytest.raises(UserError, match="a study 't-finalists' exists"):
        check_finalists(space(study__name="t"), layout)


def test_test_rows_are_read_by_no_trial_and_need_finalists(layout: Layout) -> None:
    study = searched(layout, space(trial__test_data="org/test", trial__test_split="held-out"))
    finals = space_of(study, choose(study))
    configs = [finals.trial_config(point) for point in finals.points_to_evaluate]
    assert {(config.test_data, config.test_split) for config in configs} == {(None, None)}
    tested = study.config(0).on_test()
    named = (tested.validation_data, tested.validation_split, tested.train_data, tested.has_test)
    assert named == ("org/test", "held-out", "org/test", False)
    assert study.config(0).has_test
    with pytest.raises(UserError, match=r"trial\.test_data: is read once a winner is found among finalists"):
        check_finalists(space(study__finalists=0, trial__test_data="org/test"), layout)


def test_what_was_measured_on_the_test_rows_is_kept_with_the_run(layout: Layout) -> None:
    study = searched(layout, space())
    trained(study)
    found = finals_of(study)
    assert found is not None
    assert found.test == {}
    keep_test(found, {"eval_loss": 0.25})
    again = finals_of(load_study(layout, "s"))
    assert again is not None
    assert again.test == {"eval_loss": 0.25}


def test_a_study_without_finalists_has_none(layout: Layout) -> None:
    study = searched(layout, space(study__finalists=0))
    assert finals_of(study) is None
    assert chosen_of(study) is None
    check_finalists(study.space, layout)


def test_finalists_have_neither_sampler_nor_early_stops(layout: Layout) -> None:
    study = searched(layout, space(study__scheduler="asha", study__sampler="tpe"))
    found = space_of(study, choose(study)).study
    assert (found.scheduler, found.finalists, found.name) == ("none", 0, "s-finalists")


def typed(layout: Layout, *words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--storage-path", str(layout.storage_path)])


def test_whoever_trains_finalists_holds_their_search(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    from bilora_ray.search import run

    held = []
    monkeypatch.setattr(run, "search", lambda *_, **__: held.append(is_held(layout.searching("s"))))
    study, watcher = searched(layout, space()), cast("Any", None)
    run.search_finalists(study, ray_address=None, mlflow_uri=None, digests={}, watcher_of=lambda _: watcher)
    assert held == [True]


@pytest.mark.parametrize("runs", ["s", "s-finalists"])
def test_a_search_is_deleted_with_its_finalists_and_not_while_they_train(layout: Layout, runs: str) -> None:
    study = searched(layout, space())
    trained(study)
    with running_study(layout, runs):
        refused = typed(layout, "delete", "s", "--yes")
    assert (refused.exit_code, "is being searched by another process" in refused.stderr) == (2, True)
    result = typed(layout, "delete", "s", "--yes")
    assert result.exit_code == 0, result.stderr
    assert study_names(layout) == []
    assert list((layout.storage_path / "studies").iterdir()) == []
    check_finalists(space(), layout)


def test_who_stops_a_search_stops_the_training_of_its_finalists(layout: Layout) -> None:
    study = searched(layout, space())
    begun = begin(study, {})
    assert begun is not None
    with ThreadPoolExecutor() as pool:
        with running_study(layout, "s"), running_study(layout, "s-finalists"):
            finals = open_study(begun[0], layout, {})
            finals.next_trials()
            stopping = pool.submit(typed, layout, "stop", "s")
            while not finals.asked_to_stop():
                assert not stopping.done()
            finals.release()
        assert "stopped" in stopping.result().stdout


@pytest.mark.parametrize(
    "words",
    [
        ["export", "s-finalists", "--output", "out"],
        ["clone", "s-finalists", "new"],
        ["train", "--study", "s-finalists", "--name", "new"],
        ["enqueue", "s-finalists", "seed=1"],
    ],
)
def test_the_study_of_finalists_has_no_best_and_names_their_search(layout: Layout, words: list[str]) -> None:
    trained(searched(layout, space()))
    result = typed(layout, *words)
    line = "study 's-finalists': trains the finalists of 's', where they are judged; name that one"
    assert (result.exit_code, result.stderr) == (2, f"Error: {line}\n")
    shown = typed(layout, "show", "s-finalists").stdout
    assert "`bilora-ray show s` judges them" in shown
    assert "Best" not in shown
    told = json.loads(typed(layout, "show", "s-finalists", "--json").stdout)
    assert (told["best"], told["finalists_of"]) == (None, "s")
    assert [one["best"] is None for one in json.loads(typed(layout, "show", "--json").stdout)] == [False, True]


@pytest.mark.slow
def test_a_search_goes_on_with_its_finalists_and_a_resume_trains_none_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.config("causal-lm", max_steps=2, eval_steps=1)
    study = {"name": "s", "num_trials": 2, "scheduler": "none", "finalists": 2, "finalist_seeds": 2}
    trial = {**config.model_dump(exclude_defaults=True), "rho": {"low": 0.1, "high": 0.9}}
    trial["test_data"] = str(write_rows(tmp_path / "test.jsonl", [{"prompt": "say red", "completion": "red"}] * 3))
    tested = []
    Path("space.yaml").write_text(json.dumps({"study": study, "trial": trial}))
    for more in ((), ("--resume",)):
        result = CliRunner().invoke(main, ["tune", "--space", "space.yaml", "--json", *more])
        assert result.exit_code == 0, result.stderr
        told = json.loads(result.stdout)
        assert len(told["trials"]) == 2
        assert len(told["finalists"]["finalists"]) == 2
        assert all(None not in finalist["scores"] for finalist in told["finalists"]["finalists"])
        assert Path(told["finalists"]["adapter"]).is_dir()
        tested.append(told["finalists"]["test"])
    assert tested[0]["eval_loss"] > 0
    assert tested[1] == tested[0]
    assert len(load_study(Layout(tmp_path / "runs"), "s-finalists").records()) == 4
    result = CliRunner().invoke(main, ["export", "s", "--output", "out", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["study"] == "s-finalists"
    measured = evaluate_adapter(Path("out"), TrialConfig(**trial | {"rho": 0.1}).on_test())
    assert measured["eval_loss"] == pytest.approx(tested[0]["eval_loss"], rel=1e-4)
