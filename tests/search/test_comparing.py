"""Comparisons of simulated trainings: equal tuning, paired runs, each score once, whatever interrupts them."""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from optuna.exceptions import StorageInternalError
from ray.exceptions import RayActorError

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import CommonCause, MachineError, UserError
from bilora_ray.evidence.kept import PICTURE, TEXT
from bilora_ray.evidence.outcome import Outcome, notes, sentences
from bilora_ray.library.asked import Asked
from bilora_ray.library.comparing import check_comparison, run_comparison
from bilora_ray.records import TrialRecord
from bilora_ray.report.found import read as read_page
from bilora_ray.report.page import page
from bilora_ray.runners import measuring
from bilora_ray.search import preflight, session, simulated
from bilora_ray.search.comparing import run as comparing_run
from bilora_ray.search.comparing import told as comparing_told
from bilora_ray.search.comparing.file import Comparison, load_comparison, tuned_without_test
from bilora_ray.search.comparing.gathered import edges, gathered, step_seconds
from bilora_ray.search.comparing.run import Comparing, asked_of, check_begun, compare
from bilora_ray.search.comparing.told import tell_outcome
from bilora_ray.search.preflight import pinned
from bilora_ray.search.simulated import Metrics
from bilora_ray.search.space import Space, StudyConfig
from bilora_ray.search.space.order import check_settings
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.comparisons import (
    entries_of,
    run_seeds,
    runs_space,
    seeds_of,
    tuning_points,
)
from bilora_ray.search.study.control.untrained import to_compare
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import check_study, load_study, open_study, summarise
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import StudyView

FILE = """
comparison: {name: c, tune: 4, seeds: 5, sharpness_radius: null}
trial:
  model_name_or_path: org/model
  task: causal-lm
  train_data: org/data
  validation_data: org/validation
  test_data: org/test
  seed: 3
  learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
  max_steps: 4
methods:
  lora: {}
  bilora: {rho: {low: 0.005, high: 1.0, log: true}, rank: {choice: [4, 16]}}
  halved: {method: bilora, rank: 4, auxiliary_rank: rank / 2, rho: {low: 0.1, high: 0.2}}
"""


# As it is outside of a world.
SCORED = comparing_run._scored


class World:
    """A machine that trains in no time, and may die.

    Attributes:
        dies_at: how many evaluations more it makes before it does; None: it lives.
        fails: which trainings fail.
        trained: how often each run was begun, by entry and seed.
        scored: which runs were scored, in order.
        begun: how often a cluster was started.
    """

    def __init__(self, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layout = layout
        self.dies_at: int | None = None
        self.fails: Callable[[TrialConfig], bool] = lambda config: False
        self.scored: list[int] = []
        self.said: list[str] = []
        self.labels: list[str] = []
        self.have_best: list[bool] = []
        self.begun = 0
        monkeypatch.setattr(comparing_run, "search", self.search)
        monkeypatch.setattr(comparing_run, "joined", self.joined)
        monkeypatch.setattr(comparing_run, "at_once", lambda space, say: 2)
        monkeypatch.setattr(comparing_run, "_scored", self.score)

    @contextmanager
    def joined(self, *_: object) -> Iterator[None]:
        self.begun += 1
        yield

    def search(
        self,
        space: Space,
        layout: Layout,
        *,
        part: Mapping[str, Any],
        digests: Mapping[str, str],
        resume: bool,
        **_: object,
    ) -> StudyView:
        check_study(space, layout, resume, digests)
        assert space.fixed.get("precision") != "auto"
        study = open_study(space, layout, digests, part)
        try:
            while numbers := study.next_trials():
                for number in numbers:
                    self.train(study, number)
        finally:
            study.release()
        return study

    def train(self, study: SearchStudy, number: int) -> None:
        self.lives()
        config = study.config(number)
        if self.fails(config):
            study.fail(number, "loss is nan at step 2", by_settings=True)
            return
        told = _curve(config)
        for end in (1, 2):
            simulated._write(study.folder(number), told[:end], study)
            study.report(number, told[end - 1])

    def score(self, comparing: Comparing, runs: StudyView, left: Sequence[TrialRecord], count: int) -> dict[int, str]:
        for record in left:
            self.lives()
            self.scored.append(record.number)
            found = _quality(runs.config(record.number))
            comparing_run.keep_score(self.layout, runs.space.study.name, record.number, {"eval_loss": found})
        return {}

    def lives(self) -> None:
        if self.dies_at is not None:
            self.dies_at -= 1
            if self.dies_at < 0:
                raise KeyboardInterrupt

    def compare(self, comparison: Comparison, resume: bool = False, more: int | None = None) -> Outcome:
        check_begun(comparison, self.layout, {}, resume or more is not None, more)
        asked = asked_of(comparison)
        comparing = Comparing(comparison, self.layout, None, None, {}, self.watch, self.said.append, asked)
        compare(comparing, more)
        return gathered(comparison, self.layout)

    def watch(self, *_: object, labels: Sequence[str], has_best: bool) -> Any:
        self.labels.append(labels[0])
        self.have_best.append(has_best)


def _curve(config: TrialConfig) -> list[Metrics]:
    quality = _quality(config)
    return [{"step": s, "max_steps": 4, "eval_loss": quality, "train_runtime": float(s)} for s in (2, 4)]


def _quality(config: TrialConfig) -> float:
    """Better for Bi-LoRA; with the noise of the seed, which all methods share, and some of their own."""
    gain = 0.2 if config.method == "bilora" else 0.0
    noise = Random(config.seed).gauss(0, 1) + Random(f"{config.seed} {config.method} {config.rank}").gauss(0, 0.01)
    return 3.0 + noise - gain - config.learning_rate


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The storage path of a comparison that is finished, and its outcome."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder / "runs", World(Layout(folder / "runs"), monkeypatch).compare(read(folder))


@pytest.fixture
def after(finished: tuple[Path, Outcome], world: World) -> tuple[World, Outcome]:
    """A world in which that comparison is finished."""
    shutil.copytree(finished[0], world.layout.storage_path)
    return world, finished[1]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(Layout(tmp_path / "runs"), monkeypatch)


def read(folder: Path, *overrides: str) -> Comparison:
    file = folder / "c.yaml"
    file.write_text(FILE, encoding="utf-8")
    return load_comparison(file, overrides)


def runs_of(world: World) -> StudyView:
    return load_study(world.layout, "c-runs")


def test_each_entry_is_tuned_alike_and_then_run_on_the_same_fresh_seeds(tmp_path: Path, world: World) -> None:
    outcome = world.compare(read(tmp_path))
    tuned = {entry: load_study(world.layout, f"c-tune-{entry}") for entry in outcome.entries}
    rates = {entry: [record.sampled["learning_rate"] for record in study.records()] for entry, study in tuned.items()}
    assert all(len(found) == 4 for found in rates.values())
    assert rates["lora"] == rates["bilora"] == rates["halved"]
    runs = runs_of(world)
    found = {(record.sampled["variant"], record.sampled["seed"]) for record in runs.records()}
    seeds = {seed for _, seed in found}
    assert len(found) == len(runs.records()) == 15
    assert len(seeds) == 5
    assert 3 not in seeds
    order = [record.sampled["variant"] for record in runs.records()]
    assert order == ["lora", "bilora", "halved"] * 5  # so that a drift of the machine is shared
    for record in runs.records():
        best = tuned[record.sampled["variant"]].best()
        assert best is not None
        own, tried = runs.config(record.number), tuned[record.sampled["variant"]].config(best.number)
        changed = {key for key, value in own.model_dump().items() if value != tried.model_dump()[key]}
        assert changed <= {"seed", "split_seed", "variant"}
        assert own.resolved_split_seed == tried.resolved_split_seed == 3
    assert world.begun == 1
    assert sorted(world.scored) == list(range(15))
    assert world.have_best == [True, True, True, False]


def test_the_runs_study_is_a_space_like_any_other(after: tuple[World, Outcome]) -> None:
    space = runs_of(after[0]).space
    check_settings(space)
    assert space.names_of("variant") == ["variant"]
    assert space.names_of("seed") == ["seed"]
    assert {name.partition("@")[0] for name in space.given} >= {"method", "rho", "rank"}
    assert "rho@variant=lora" not in space.given  # which reads none
    assert space.fixed["split_seed"] == 3
    assert "test_data" not in space.fixed


def test_what_is_better_on_each_seed_is_told(finished: tuple[Path, Outcome]) -> None:
    outcome = finished[1]
    assert (outcome.metric, outcome.greater_is_better, outcome.baseline) == ("test_loss", False, "lora")
    assert outcome.verdict("bilora") == "better"
    found = outcome.differences["bilora"]
    assert found is not None
    assert found.mean == pytest.approx(-0.2, abs=0.05)
    assert [one.trials for one in outcome.tuned] == [4, 4, 4]
    # A trial takes 4 seconds, and there is a device each.
    assert outcome.tuned[0].device_hours == pytest.approx(4 * 4 / 3600)


@pytest.mark.parametrize("deaths", [(3, 11, 14), (0, 14, 16)])
def test_whoever_is_killed_goes_on_to_the_same_table(
    tmp_path: Path, world: World, deaths: Sequence[int], finished: tuple[Path, Outcome]
) -> None:
    for death in deaths:
        world.dies_at = death
        with pytest.raises(KeyboardInterrupt):
            world.compare(read(tmp_path), resume=_has_begun(world))
    world.dies_at = None
    assert world.compare(read(tmp_path), resume=_has_begun(world)) == finished[1]
    assert sorted(world.scored) == list(range(15))
    assert len(runs_of(world).records()) == 15


def _has_begun(world: World) -> bool:
    try:
        return bool(load_study(world.layout, "c-tune-lora").records())
    except UserError:
        return False


def test_a_finished_comparison_starts_nothing_and_says_the_same(tmp_path: Path, after: tuple[World, Outcome]) -> None:
    world, first = after
    assert world.compare(read(tmp_path), resume=True) == first
    assert (world.scored, world.begun) == ([], 0)


def test_more_seeds_leave_those_there_were_and_the_look_is_told(tmp_path: Path, after: tuple[World, Outcome]) -> None:
    world, first = after
    runs = check_begun(read(tmp_path), world.layout, {}, True, 2)
    assert runs is not None
    assert (seeds_of(runs), entries_of(runs)) == (5, ("lora", "bilora", "halved"))
    more = world.compare(read(tmp_path), more=2)
    assert len(more.seeds) == 7
    assert more.seeds[:5] == first.seeds
    assert [run for run in more.runs if run.seed in first.seeds] == list(first.runs)
    assert sorted(world.scored) == list(range(15, 21))
    assert more.extended
    assert not first.extended
    assert any("after a look" in note for note in notes(more))
    assert world.compare(read(tmp_path), resume=True) == more  # which is not shrunk


def test_more_seeds_that_are_interrupted_are_not_asked_for_twice(tmp_path: Path, after: tuple[World, Outcome]) -> None:
    world, _ = after
    world.dies_at = 4
    with pytest.raises(KeyboardInterrupt):
        world.compare(read(tmp_path), more=2)
    world.dies_at = None
    assert len(world.compare(read(tmp_path), resume=True).seeds) == 7


def test_an_entry_whose_trials_all_fail_is_told_of_and_the_others_go_on(tmp_path: Path, world: World) -> None:
    world.fails = lambda config: config.rank == 4 and config.auxiliary_rank == 2
    outcome = world.compare(read(tmp_path))
    assert "halved: none of its 4 trials is complete; `bilora-ray show c-tune-halved` says how" in world.said[0]
    assert {run.entry for run in outcome.runs} == {"lora", "bilora"}
    assert outcome.differences["halved"] is None
    assert world.compare(read(tmp_path), resume=True) == outcome


def test_a_baseline_whose_trials_all_fail_ends_it(tmp_path: Path, world: World) -> None:
    world.fails = lambda config: config.method == "lora"
    with pytest.raises(UserError, match=r"lora: none of its 4 trials is complete.*the others are compared with it"):
        world.compare(read(tmp_path))


def test_a_run_that_fails_drops_its_pair_alone(tmp_path: Path, world: World) -> None:
    comparison = read(tmp_path)
    (seed, *_) = run_seeds(0, 5, [3])
    world.fails = lambda config: config.seed == seed and config.method == "bilora"
    outcome = world.compare(comparison)
    found = outcome.differences["bilora"]
    assert found is not None
    assert found.pairs == 4
    assert sum(run.quality is None for run in outcome.runs) == 2
    assert any("1 of 5 runs have no score" in note for note in notes(outcome))
    assert len(world.scored) == 13
    assert world.compare(comparison, resume=True) == outcome  # a failure is what it is


def test_trials_that_all_fail_for_one_cause_are_all_tried_unless_a_machine_is_why(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    halted = iter([True, False])

    def search(space: Space, *arguments: object, **rest: Any) -> StudyView:
        found = world.search(space, *arguments, **rest)  # type: ignore[arg-type]
        if "bilora" in space.study.name and next(halted, False):
            raise CommonCause("5 trials in a row failed")
        return found

    monkeypatch.setattr(comparing_run, "search", search)
    world.fails = lambda config: config.method == "bilora"
    with pytest.raises(UserError, match="lora alone has a trial that is complete"):
        world.compare(read(tmp_path))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("comparison.tune=5", "began with another file: tune was 4, is 5"),
        ("comparison.seeds=6", "began with another file: seeds was 5, is 6; --extend adds seeds"),
        ("comparison.budget=seconds", "budget was 'steps', is 'seconds'"),
        ("comparison.baseline=bilora", "baseline was 'lora', is 'bilora'"),
        ("max_steps=5", "max_steps was 4, is 5"),
        ("comparison.sharpness_radius=0.1", "sharpness_radius was None, is 0.1"),
        ("retention_data=builtin:quickstart/chats.jsonl", "retention_data was None, is '"),
        ("test_data=org/other", "test_data was 'org/test', is 'org/other'"),
        ("test_split=dev", "test_split was None, is 'dev'"),
        ("rank=2", "study 'c-tune-lora' began with other space: rank was 8, is 2"),
        ("methods.bilora.rho={low: 0.1, high: 1}", "study 'c-tune-bilora' began with other space: rho was"),
    ],
)
def test_another_file_is_refused_with_what_changed(
    tmp_path: Path, after: tuple[World, Outcome], override: str, line: str
) -> None:
    world, _ = after
    with pytest.raises(UserError) as error:
        world.compare(read(tmp_path, override), resume=True)
    assert line in str(error.value)


FILES = {
    "train_data": "train.jsonl",
    "validation_data": "validation.jsonl",
    "test_data": "test.jsonl",
    "retention_data": "texts.jsonl",
}


def files_in(folder: Path, changed: str = "") -> Comparison:
    """A comparison of files in `folder`, one of which is another than it is elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test", "texts"):
        rows = [{"prompt": f"{name} {n}", "completion": "yes", "text": f"{name} {n}"} for n in range(9)]
        rows = rows[1:] if name == changed else rows
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    found = [f"{key}={folder / name}" for key, name in FILES.items()]
    return read(folder, "model_name_or_path=builtin:quickstart/model", "max_length=64", *found)


def of_files(world: World, comparison: Comparison, **asked: bool) -> Outcome | None:
    """As a person asks for it, whose data are files; None of a dry run."""
    checks = check_comparison(comparison, Asked(layout=world.layout, **asked))  # type: ignore[arg-type]
    return None if checks.asked.dry_run else run_comparison(checks, world.watch, world.said.append)


def test_what_has_begun_in_a_job_goes_on_in_another_one(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing_told, "tell_outcome", lambda *_: None)

    def job(name: str, changed: str = "") -> Comparison:
        return files_in(tmp_path / f"_ray_pkg_{name}", changed)

    of_files(world, job("a0"), dry_run=True)
    assert not world.layout.storage_path.exists()
    world.dies_at = 16
    with pytest.raises(KeyboardInterrupt):
        of_files(world, job("a1"))
    kept = sorted((world.layout.storage_path / "inputs").rglob("*"))
    world.dies_at = None
    for name in ("train", "test", "texts"):
        with pytest.raises(UserError, match=f"{name}.jsonl', is '"):
            of_files(world, job(f"b{len(name)}", changed=name), resume=True)
    of_files(world, job("c1"), resume=True, dry_run=True)
    outcome = of_files(world, job("c2"), resume=True)
    assert outcome is not None
    assert len(outcome.runs) == 15
    assert sorted((world.layout.storage_path / "inputs").rglob("*")) == kept


def test_all_entries_compute_with_the_numbers_of_the_first_machine(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing_told, "tell_outcome", lambda *_: None)
    machines = iter(["fp32", "bf16"])

    def decided(space: Space, own: bool) -> Space:
        return replace(space, fixed={**space.fixed, "precision": next(machines)})

    monkeypatch.setattr(comparing_run, "decided", decided)
    world.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        of_files(world, files_in(tmp_path))
    world.dies_at = None
    of_files(world, files_in(tmp_path), resume=True)
    studies = [load_study(world.layout, name) for name in ("c-tune-lora", "c-tune-bilora", "c-tune-halved", "c-runs")]
    found = [study.config(record.number).precision for study in studies for record in study.records()]
    assert found == ["fp32"] * (3 * 4 + 15)


def test_what_has_not_begun_has_the_commits_of_what_has(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces, parts = read(tmp_path).spaces, ["c-tune-lora", "c-tune-bilora"]
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(preflight, "_hub_commit", lambda *_, now=commit: now)
        monkeypatch.setattr(preflight, "_dataset_commit", lambda *_, now=commit: now)
        found = [pinned(spaces[entry], world.layout, beside=parts) for entry in ("lora", "bilora")]
        pins = [(one.fixed["model_revision"], one.fixed["train_revision"]) for one in found]
        assert pins == [("a" * 40, "a" * 40)] * 2
        if commit[0] == "a":
            first = replace(found[0], fixed={**found[0].fixed, "precision": "fp32"})
            world.search(tuned_without_test(first), world.layout, part={}, digests={}, resume=False)


@pytest.mark.parametrize("changed", ["train", "test", "texts"])
def test_other_content_at_the_same_path_is_refused(tmp_path: Path, world: World, changed: str) -> None:
    world.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        of_files(world, files_in(tmp_path / "mine"))
    with pytest.raises(UserError, match=rf"study 'c-tune-lora' began with other data: .*{changed}.jsonl was"):
        of_files(world, files_in(tmp_path / "mine", changed), resume=True)


def test_who_forgets_to_resume_or_has_nothing_to_is_told(tmp_path: Path, world: World) -> None:
    for arguments in ({"resume": True}, {"more": 1}):
        with pytest.raises(UserError, match="comparison 'c': nothing to resume"):
            world.compare(read(tmp_path), **arguments)  # type: ignore[arg-type]
    world.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        world.compare(read(tmp_path))
    with pytest.raises(UserError, match=r"comparison 'c' exists in .*: go on with --resume"):
        world.compare(read(tmp_path))
    with pytest.raises(UserError, match="--extend 1: comparison 'c' has no run yet; go on with --resume"):
        world.compare(read(tmp_path), more=1)


def test_a_study_of_another_origin_is_not_taken_over(tmp_path: Path, world: World) -> None:
    settings = ["model_name_or_path=org/m", "task=causal-lm", "train_data=org/d", "rho={low: 0.1, high: 1}"]
    other = load_space(None, ["study.name=c-runs", "study.num_trials=1", *settings])
    study = open_study(other, world.layout, {})
    simulated.simulate(study, _curve)
    study.release()
    with pytest.raises(UserError, match="comparison 'c': a study 'c-runs' exists, which is none of it; rename this"):
        world.compare(read(tmp_path))


def test_more_seeds_begin_with_those_of_fewer() -> None:
    few, many = run_seeds(7, 3, [1]), run_seeds(7, 50, [1])
    assert many[:3] == few
    assert len(set(many)) == 50
    assert run_seeds(7, 3, [few[1]]) == (few[0], *many[2:4])
    assert run_seeds(8, 3, [1]) != few


def test_conditions_of_an_entry_decide_what_its_trials_try(tmp_path: Path) -> None:
    two = "methods.bilora.rho=[{low: 0.1, high: 0.2, when: {rank: 4}}, {low: 0.5, high: 0.9, when: {rank: 16}}]"
    space = read(tmp_path, two).spaces["bilora"]
    points = tuning_points(space, 8, 4, ["learning_rate"])
    assert {point["rank"] for point in points} == {4, 16}
    for point in points:
        assert (float(str(point["rho"])) < 0.3) is (point["rank"] == 4)
        space.trial_config(point)


def test_the_pairs_of_a_step_say_how_long_it_takes() -> None:
    told = [
        {"step": 2, "num_input_tokens_seen": 100, "tokens_per_second": 25.0},
        {"step": 6, "num_input_tokens_seen": 300, "tokens_per_second": 50.0},
        {"step": 8, "num_input_tokens_seen": 400, "tokens_per_second": 50.0},
    ]
    assert step_seconds(told) == 1.0
    assert step_seconds([]) is None


class Processes:
    """Stands for Ray, as `_scored` uses it.

    Attributes:
        deadly: the runs that kill the process that scores them.
        room: how many processes are ever ready.
        begun: how many were asked for.
    """

    ObjectRef = int

    def __init__(self, deadly: set[int], room: int) -> None:
        self.deadly, self.room, self.begun = deadly, room, 0

    def remote(self, **_: object) -> Any:
        return lambda _: SimpleNamespace(remote=self.begin)

    def begin(self, *_: object) -> Any:
        self.begun += 1
        ready = self.begun <= self.room
        return SimpleNamespace(
            score=SimpleNamespace(remote=lambda adapter, *_: int(Path(adapter).parent.name)),
            __ray_ready__=SimpleNamespace(remote=lambda: ready),
        )

    def wait(self, asked: list[Any], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        if asked == [False]:
            assert timeout is not None, "waits for ever"
            return [], asked
        return asked[:num_returns], asked[num_returns:]

    def get(self, number: int) -> dict[str, float]:
        if number in self.deadly:
            raise RayActorError
        return {"eval_loss": float(number)}

    def score(self, world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[int, str], list[int]]:
        """Why runs could not be scored, and those that were; by two processes."""
        runs, scored = runs_of(world), list[int]()
        left = [replace(record, adapter=Path(f"runs/{record.number}/step-1")) for record in runs.records()]
        monkeypatch.setattr(comparing_run, "ray", self)
        monkeypatch.setattr(comparing_run, "keep_score", lambda layout, name, number, _: scored.append(number))
        comparison, search = read(world.layout.storage_path), world.search
        comparing = Comparing(comparison, world.layout, None, None, {}, search, print, {})  # type: ignore[arg-type]
        return SCORED(comparing, runs, left, 2), scored


@pytest.mark.parametrize(("deadly", "begun"), [({1}, 2), ({0, 1, 2}, 4), (set(range(15)), 15)])
def test_a_process_that_dies_as_it_scores_costs_the_run_that_it_had_alone(
    after: tuple[World, Outcome], deadly: set[int], begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(deadly, room=15)
    failed, scored = processes.score(after[0], monkeypatch)
    assert set(failed) == deadly
    assert sorted(scored) == sorted(set(range(15)) - deadly)
    assert processes.begun == begun  # a new one where none is left


def test_room_that_is_gone_with_a_node_is_not_waited_for_for_ever(
    after: tuple[World, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, scored = Processes({0, 3}, room=2).score(after[0], monkeypatch)
    assert set(failed) == set(range(15)) - set(scored)
    assert {0, 3} < set(failed)
    assert failed[14] == "there was no room for a process in 10 minutes"


@pytest.mark.parametrize(
    ("words", "takes_trial"),
    [
        (["export", "c-runs", "--output", "out"], True),
        (["clone", "c-runs", "new"], False),
        (["train", "--study", "c-runs", "--name", "new"], True),
        (["enqueue", "c-runs", "seed=1"], False),
    ],
)
def test_none_of_the_runs_is_taken_for_the_best(
    after: tuple[World, Outcome], words: list[str], takes_trial: bool
) -> None:
    result = typed(after[0], *words)
    line = "study 'c-runs': holds the runs of comparison 'c': none is its best, and nothing is searched"
    line += "; --trial takes one of them" if takes_trial else ""
    assert (result.exit_code, result.stderr) == (2, f"Error: {line}\n")


def test_the_runs_are_shown_as_those_of_a_comparison(after: tuple[World, Outcome]) -> None:
    world, outcome = after
    tell_outcome(outcome, runs_of(world), None, world.said.append)
    shown = typed(world, "show", "c-runs").stdout
    assert "\n".join(sentences(outcome)) in shown
    assert "These are the runs of comparison 'c', which `bilora-ray compare` and --resume tell of" in shown
    assert "Best" not in shown
    assert "What mattered" not in shown
    assert json.loads(typed(world, "show", "c-runs", "--json").stdout)["best"] is None
    assert {one.study: one.best is None for one in summarise(world.layout)}["c-runs"]
    found = read_page(runs_of(world))
    assert (found.best, found.chosen) == (None, None)
    text = page([found])
    assert "These are the runs of comparison &#39;c&#39;, of which none is the best" in text
    assert "bilora-ray compare FILE.yaml" in text
    assert "bilora-ray tune" not in text
    assert "Search history" not in text
    assert "Pairs of settings" not in text
    assert "Learning curves" in text
    assert "Best: trial" in typed(world, "show", "c-tune-lora").stdout


def test_mlflow_is_handed_no_adapter_of_the_runs(after: tuple[World, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "served_of", lambda study, best: best)
    part, runs = closed(after[0], "c-tune-lora"), closed(after[0], "c-runs")
    best = load_study(after[0].layout, "c-tune-lora").best()
    assert best is not None
    assert (part.best, part.served) == (best.number, best)
    assert (runs.best, runs.served, len(runs.trials)) == (None, None, 15)
    assert to_compare(runs_of(after[0])) is None
    assert runs.told == ["These are the runs of comparison 'c': its outcome is among metrics and artifacts"]


def closed(world: World, name: str) -> Any:
    """What the tracker gets at the end of a study's session."""
    told, names = list[Any](), ("trials", "best", "interrupted", "others", "front", "told", "served")
    tracking = Future[Any]()
    tracking.set_result(SimpleNamespace(close=lambda *values: told.append(values)))
    study = open_study(load_study(world.layout, name).space, world.layout, {})
    session.Session(study, SimpleNamespace(say=world.said.append), tracking).close()  # type: ignore[arg-type]
    (values,) = told
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def typed(world: World, *words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--storage-path", str(world.layout.storage_path)])


def test_what_was_found_is_kept_as_text_and_picture(after: tuple[World, Outcome]) -> None:
    (world, outcome), said = after, list[str]()
    folder = tell_outcome(outcome, runs_of(world), None, said.append)
    assert json.loads((folder / TEXT).read_text(encoding="utf-8"))["entries"][1]["verdict"] == "better"
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_page_of_the_runs_says_what_was_found(after: tuple[World, Outcome]) -> None:
    (world, outcome), text = after, "none is the best; `bilora-ray compare`"
    assert text in html.unescape(page([read_page(runs_of(world))]))
    kept = tell_outcome(outcome, runs_of(world), None, world.said.append)
    told = html.unescape(world.layout.report("c-runs").read_text(encoding="utf-8"))
    assert text not in told
    for line in (*sentences(outcome), *notes(outcome)):
        assert f"{line}." in told
    assert base64.b64encode((kept / PICTURE).read_bytes()).decode("ascii") in told


def test_mlflow_is_told_of_what_was_kept_by_whoever_could_not_tell_it(
    after: tuple[World, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world, outcome), told = after, list[dict[str, float]]()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing_told, "tell_result", killed)
    with pytest.raises(KeyboardInterrupt):
        tell_outcome(outcome, runs_of(world), None, world.said.append)
    monkeypatch.setattr(comparing_told, "tell_result", lambda *args, **_: told.append(args[2]))
    tell_outcome(outcome, runs_of(world), None, world.said.append)
    assert [metrics["test_loss/bilora"] for metrics in told] == [outcome.mean("bilora")]


def test_mlflow_is_told_anew_once_a_score_has_come_late(
    after: tuple[World, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow keeps the value that a metric has at a step."""
    (world, outcome), told = after, list[dict[str, float]]()
    monkeypatch.setattr(comparing_told, "tell_result", lambda *args, **_: told.append(args[2]))
    first, *others = outcome.runs
    for runs in ((replace(first, quality=None), *others), outcome.runs):
        tell_outcome(replace(outcome, runs=runs), runs_of(world), None, world.said.append)
    assert told[0]["step"] < told[1]["step"]


DECAYS = "[{low: 1e-4, high: 0.1, log: true, when: {rank: 4}}, {choice: [0.0], when: {rank: 16}}]"
RATES = "[{low: 1e-4, high: 1e-2, log: true, when: {rank: 4}}, {low: 1e-3, high: 0.1, log: true, when: {rank: 16}}]"


def test_the_edge_of_a_part_is_that_of_the_trials_that_were_asked_for_it(tmp_path: Path, world: World) -> None:
    world.compare(read(tmp_path, f"methods.bilora.weight_decay={DECAYS}"))
    study = load_study(world.layout, "c-tune-bilora")
    records = study.records()
    assert {record.sampled["rank"] for record in records} == {4, 16}
    for record in records:
        assert set(edges(study, record, records)) <= {"weight_decay", "learning_rate", "rho"}


def test_parts_of_a_setting_have_one_coordinate(tmp_path: Path) -> None:
    spaces = read(tmp_path, "lora_dropout={low: 0.0, high: 0.5}", f"methods.bilora.learning_rate={RATES}").spaces
    shared = ("learning_rate", "lora_dropout")
    found = {entry: tuning_points(spaces[entry], 4, 4, shared) for entry in ("lora", "bilora")}
    dropouts = [[point["lora_dropout"] for point in points] for points in found.values()]
    assert dropouts[0] == dropouts[1]
    rates = zip(found["lora"], found["bilora"], strict=True)
    for one, other in rates:
        assert other["learning_rate"] == pytest.approx(one["learning_rate"] * (10 if other["rank"] == 16 else 1))


def test_a_distribution_shared_by_all_is_drawn_alike(tmp_path: Path) -> None:
    comparison = read(tmp_path, "lora_dropout={low: 0.0, high: 0.5}")
    most = max(len(space.distributions) for space in comparison.spaces.values())
    assert comparison.searched_by_all == ("learning_rate", "lora_dropout")
    points = [tuning_points(space, 4, most, comparison.searched_by_all) for space in comparison.spaces.values()]
    shared = [[(point["learning_rate"], point["lora_dropout"]) for point in found] for found in points]
    assert shared[0] == shared[1] == shared[2]


def test_entries_of_distinct_ranks_keep_them(tmp_path: Path) -> None:
    comparison = read(tmp_path)
    spaces = comparison.spaces
    best = {entry: spaces[entry].first_config().model_dump(exclude={"variant", "seed"}) for entry in spaces}
    runs = runs_space(spaces["lora"], "c-runs", best, [1, 2])
    found = {str(point["variant"]): runs.trial_config(point) for point in runs.points_to_evaluate}
    assert {entry: config.rank for entry, config in found.items()} == {"lora": 8, "bilora": 4, "halved": 4}
    assert found["halved"].auxiliary_rank == 2
    assert isinstance(runs.study, StudyConfig)


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Have a step of each entry take so long."""

    def measured(settings: Sequence[object], *_: object) -> list[tuple[float, SimpleNamespace]]:
        entries = list(seconds) * (len(settings) // len(seconds))
        return [(0.0, SimpleNamespace(step=seconds[entry], train_rows=64, step_rows=8)) for entry in entries]

    monkeypatch.setattr(measuring, "measured", measured)


def test_entries_of_equal_seconds_have_the_steps_that_these_leave_them(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, lora=1.0, bilora=2.0, halved=0.5)
    comparison = read(tmp_path, "comparison.budget=seconds", "max_steps=12")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparing_run, "measured_steps", killed)
        with pytest.raises(KeyboardInterrupt):
            world.compare(comparison)
    world.compare(comparison, resume=True)
    monkeypatch.setattr(comparing_run, "measured_steps", killed)  # which nobody asks for again
    world.compare(comparison, resume=True)
    runs = runs_of(world)
    configs = [(record.sampled["variant"], runs.config(record.number).max_steps) for record in runs.records()]
    assert set(configs) == {("lora", 12), ("bilora", 6), ("halved", 24)}


def test_an_entry_that_is_left_no_step_that_trains_is_refused(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, lora=1.0, bilora=9.0, halved=1.0)
    line = "methods.bilora: the seconds of 6 steps of lora leave it 1, all of them warm-up; give more max_steps or"
    with pytest.raises(UserError, match=f"^{line} num_train_epochs$"):
        world.compare(read(tmp_path, "comparison.budget=seconds", "max_steps=6"))


def test_a_database_that_is_gone_is_one_line(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise StorageInternalError("the database is gone")

    monkeypatch.setattr(comparing_run, "scores_of", gone)
    with pytest.raises(MachineError, match=r"^study database of .*: the database is gone"):
        world.compare(read(tmp_path))


def test_a_machine_that_fails_ends_it(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: object, **__: object) -> None:
        raise MachineError("the disk is full")

    monkeypatch.setattr(comparing_run, "search", search)
    with pytest.raises(MachineError, match="the disk is full"):
        world.compare(read(tmp_path))
