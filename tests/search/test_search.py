"""A search on a real Ray cluster of this machine, in this process: how trials end, and what can go wrong in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from chaos.nodes import ray_processes
from click.testing import CliRunner
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError
from tiny_trials import Tiny

from bilora_ray.cli.main import main
from bilora_ray.errors import MachineError, UserError
from bilora_ray.records import Status, TrialRecord
from bilora_ray.runners import own_process
from bilora_ray.search.cluster.cluster import cluster
from bilora_ray.search.run import run_trials
from bilora_ray.search.session import Observers
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study
from bilora_ray.search.study.study import SearchStudy


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with cluster(None):
        yield


def test_a_trial_takes_no_file_of_the_current_folder_for_a_package() -> None:
    assert os.getcwd() not in ray.get(ray.remote(lambda: sys.path).remote())


class Spy:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def trial_started(self, trial: TrialRecord) -> None:
        self.told.append(("started", trial.number))

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        assert metrics in trial.history
        self.told.append(("reported", trial.number))

    def trial_ended(self, trial: TrialRecord) -> None:
        assert trial.status is not Status.RUNNING
        self.told.append(("ended", trial.number))


class Broken(Spy):
    """Raises at the first report."""

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        raise RuntimeError("broken")


def space(tiny: Tiny, study: dict[str, Any] | None = None, **trial: Any) -> Space:
    config = tiny.config("causal-lm", max_steps=6, eval_steps=2)
    trial = {**config.model_dump(exclude_unset=True), "rho": "{low: 0.01, high: 0.2}", **trial}
    study = {"name": "s", "num_trials": 3, "scheduler": "none", **(study or {})}
    sections = {"study": study, "trial": trial}
    return load_space(None, [f"{name}.{key}={v}" for name, values in sections.items() for key, v in values.items()])


def run(space: Space, folder: Path, *observers: Any, concurrent: int = 1) -> SearchStudy:
    study = open_study(space, Layout(folder / "runs"), {})
    run_trials(study, Observers(observers), concurrent)
    return study


def test_every_trial_completes_and_observers_hear_of_it_in_order(tiny: Tiny, tmp_path: Path) -> None:
    spy = Spy()
    study = run(space(tiny), tmp_path, spy)
    assert [record.status for record in study.records()] == [Status.COMPLETE] * 3
    one = ["started", "reported", "reported", "reported", "ended"]
    assert spy.told == [(what, number) for number in range(3) for what in one]
    best = study.best()
    assert best is not None
    assert best.adapter is not None
    assert (best.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_ended_trials_leave_their_adapter_and_history_but_no_heavy_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    study = run(space(tiny, {"num_trials": 1}), tmp_path)
    folder = study.folder(0)
    assert folder.state()["step"] == 6
    assert [path.name for path in folder.path.rglob("*.safetensors")] == ["adapter_model.safetensors"]


def test_a_finished_study_runs_nothing_more(tiny: Tiny, tmp_path: Path) -> None:
    run(space(tiny, {"num_trials": 1}), tmp_path)
    spy = Spy()
    run(space(tiny, {"num_trials": 1}), tmp_path, spy)
    assert spy.told == []


def test_a_trial_whose_loss_explodes_fails_with_its_reason_and_the_others_go_on(tiny: Tiny, tmp_path: Path) -> None:
    exploding = space(
        tiny,
        {"points_to_evaluate": "[{learning_rate: 1.0e+30}, {learning_rate: 0.001}]", "num_trials": 2},
        learning_rate="{choice: [1.0e+30, 0.001]}",
        max_grad_norm="null",
    )
    study = run(exploding, tmp_path)
    failed, complete = study.records()
    assert (failed.status, complete.status) == (Status.FAILED, Status.COMPLETE)
    assert failed.error is not None
    assert failed.error.startswith("loss is ")


@pytest.mark.slow
def test_bad_input_that_only_a_trial_can_see_ends_the_search_with_its_line(tiny: Tiny, tmp_path: Path) -> None:
    spy = Spy()
    with pytest.raises(UserError) as error:
        run(space(tiny, target_modules="[nothing_like_it]"), tmp_path, spy)
    assert str(error.value).startswith("target_modules: ")
    assert spy.told == [("started", 0), ("ended", 0)]


CODE = """
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
{line}

class Mine(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        if not torch.is_grad_enabled():
            return super().forward(*arguments, **options)
        with Path({log!r}).open("a") as log:
            log.write("forward\\n")
        raise TypeError("not so")
"""


def with_code(tiny: Tiny, folder: Path, name: str, line: str = "") -> Path:
    """A model with code of its own, which fails as it learns, and says in `log` that it was asked."""
    model = shutil.copytree(tiny.model("causal-lm"), folder / "model")
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": f"{name}.Mine"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (model / f"{name}.py").write_text(CODE.format(log=str(folder / "log"), line=line))
    return model


@pytest.mark.slow
def test_an_error_that_would_be_the_same_again_is_met_once(tiny: Tiny, tmp_path: Path) -> None:
    model = with_code(tiny, tmp_path, "that_fails")
    study = run(space(tiny, {"num_trials": 1}, model_name_or_path=model, trust_remote_code="true"), tmp_path)
    record = study.record(0)
    assert (record.status, record.error) == (Status.FAILED, "TypeError: not so")
    assert (tmp_path / "log").read_text() == "forward\n"


SHORT_OF_MEMORY = """
from pathlib import Path
import torch
from transformers import LlamaForCausalLM

class Mine(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        if torch.is_grad_enabled() and options["input_ids"].numel() > 60:
            with Path({log!r}).open("a") as log:
                log.write("refused\\n")
            torch.empty(2**55)
        return super().forward(*arguments, **options)
"""


@pytest.mark.slow
def test_trials_that_run_out_of_memory_go_on_in_smaller_passes_and_show_says_so(tiny: Tiny, tmp_path: Path) -> None:
    model = with_code(tiny, tmp_path, "that_is_large")
    (model / "that_is_large.py").write_text(SHORT_OF_MEMORY.format(log=str(tmp_path / "log")))
    study = run(space(tiny, {"num_trials": 2}, model_name_or_path=model, trust_remote_code="true"), tmp_path)
    assert [record.status for record in study.records()] == [Status.COMPLETE] * 2
    limits = {metrics["training_limit"] for record in study.records() for metrics in record.history}
    assert max(limits) <= 60
    # The second trial begins with what the first one has learned.
    assert len((tmp_path / "log").read_text().splitlines()) <= 3
    study.release()
    shown = CliRunner().invoke(main, ["show", "s", f"--storage-path={tmp_path / 'runs'}"]).stdout
    assert f"In 2 trials: training passes of at most {min(limits)} positions: larger ones ran out of memory." in shown


@pytest.mark.slow
def test_a_package_that_a_model_misses_ends_the_search_with_its_line(tiny: Tiny, tmp_path: Path) -> None:
    model = with_code(tiny, tmp_path, "that_misses_a_package", "import no_such_package")
    spy = Spy()
    with pytest.raises(UserError, match=r"^trust_remote_code: .*pip install no_such_package"):
        run(space(tiny, model_name_or_path=model, trust_remote_code="true"), tmp_path, spy)
    assert spy.told == [("started", 0), ("ended", 0)]


@pytest.mark.slow
def test_a_machine_that_fails_ends_the_search_and_leaves_the_trial_to_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    study = open_study(space(tiny, {"num_trials": 2}), Layout(tmp_path / "runs"), {})
    study.folder(0).path.mkdir(parents=True)
    (study.folder(0).path / "adapters").write_text("in the way")
    with pytest.raises(MachineError) as error:
        run_trials(study, Observers([]), 1)
    assert str(error.value).startswith("trial 0: ")
    assert str(error.value).endswith("; mend that and go on with --resume")
    assert study.record(0).status is Status.RUNNING
    (study.folder(0).path / "adapters").unlink()
    study.release()
    again = run(space(tiny, {"num_trials": 2}), tmp_path)
    assert [record.status for record in again.records()] == [Status.COMPLETE] * 2


@pytest.mark.slow
def test_a_study_database_that_cannot_be_written_ends_the_search_with_its_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = StorageInternalError("Optuna's words")
    full.__cause__ = OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    def report(*_: object) -> None:
        raise full

    study = open_study(space(tiny, {"num_trials": 1}), Layout(tmp_path / "runs"), {})
    with monkeypatch.context() as patch:
        patch.setattr(study, "report", report)
        with pytest.raises(MachineError, match=r"database or disk is full; mend that and go on with --resume$"):
            run_trials(study, Observers([]), 1)
    study.release()
    assert run(space(tiny, {"num_trials": 1}), tmp_path).record(0).status is Status.COMPLETE


@pytest.mark.slow
def test_an_observer_that_raises_is_told_no_more_and_the_search_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    broken, spy = Broken(), Spy()
    study = run(space(tiny, {"num_trials": 2}), tmp_path, broken, spy)
    assert study.finished()
    assert broken.told == [("started", 0)]
    assert ("ended", 1) in spy.told


class Interrupter(Spy):
    """Presses Ctrl-C at the first report."""

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        super().trial_reported(trial, metrics)
        if len(self.told) == 2:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_an_interruption_although_tune_takes_it(tiny: Tiny, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    spy = Interrupter()
    study = open_study(space(tiny), Layout(tmp_path / "runs"), {})
    with pytest.raises(KeyboardInterrupt):
        run_trials(study, Observers([spy]), 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert study.record(0).status is Status.RUNNING


@pytest.mark.slow
def test_ctrl_c_is_given_back_after_trials_that_nobody_interrupted(tiny: Tiny, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run(space(tiny, {"num_trials": 1}), tmp_path).finished()
    assert signal.getsignal(signal.SIGINT) is before


def test_trials_that_end_without_their_last_evaluation_are_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_process, "RUNNER", replace(own_process.RUNNER, run=lambda task: None))
    with pytest.raises(MachineError) as error:
        run(space(tiny, {"num_trials": 2}), tmp_path)
    assert str(error.value) == "Ray ended trials that are not done (0, 1); go on with --resume"


def test_weak_trials_are_stopped_early(tiny: Tiny, tmp_path: Path) -> None:
    halving = space(
        tiny,
        {
            "scheduler": "asha",
            "grace_period": 2,
            "points_to_evaluate": "[{learning_rate: 0.01}, {learning_rate: 1.0e-9}]",
            "num_trials": 2,
        },
        learning_rate="{low: 1.0e-9, high: 0.01, log: true}",
    )
    strong, weak = run(halving, tmp_path).records()
    assert (strong.status, weak.status) == (Status.COMPLETE, Status.PRUNED)
    assert [metrics["step"] for metrics in weak.history] == [2]


@pytest.mark.slow
def test_trials_that_are_out_of_patience_are_complete(tiny: Tiny, tmp_path: Path) -> None:
    # No evaluation is better than the first by so much.
    patient = space(tiny, {"num_trials": 2}, early_stopping_patience=1, early_stopping_threshold=100.0)
    records = run(patient, tmp_path).records()
    assert [record.status for record in records] == [Status.COMPLETE] * 2
    assert [[metrics["step"] for metrics in record.history] for record in records] == [[2, 4]] * 2


class Killer(Spy):
    """Kills the worker process of a trial once, at its second report."""

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        super().trial_reported(trial, metrics)
        if len(self.told) == 3:
            for process in ray_processes(os.getpid(), "ImplicitFunc"):
                process.kill()


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    killer = Killer()
    study = run(space(tiny, {"num_trials": 1}, max_steps=40), tmp_path, killer)
    record = study.record(0)
    assert record.status is Status.COMPLETE
    assert len(record.history) == 20
    assert study.folder(0).state()["resumed_at"][0] >= 4
    assert [what for what, _ in killer.told].count("ended") == 1


@pytest.mark.slow
def test_a_trial_waits_for_the_orphan_that_still_holds_its_folder(tiny: Tiny, tmp_path: Path) -> None:
    study = open_study(space(tiny, {"num_trials": 1}), Layout(tmp_path / "runs"), {})
    seen: list[float] = []

    class Watch(Spy):
        def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
            seen.append(time.monotonic())

    pid = os.fork()
    if pid == 0:  # the orphan: holds the lock for some seconds, writes nothing
        with study.folder(0).lock(0):
            time.sleep(6)
        os._exit(0)
    started = time.monotonic()
    run_trials(study, Observers([Watch()]), 1)
    os.waitpid(pid, 0)
    assert seen[0] - started > 5
    assert study.record(0).status is Status.COMPLETE
