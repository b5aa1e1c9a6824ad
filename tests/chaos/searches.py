"""Searches of tiny trials through the command line, in a process group of their own, to be killed and resumed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import psutil
from chaos.nodes import ENVIRONMENT, Nodes, kill_group
from tiny_trials import Tiny

from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study
from bilora_ray.search.study.view import StudyView
from bilora_ray.training.folder import TENSORS, TrialFolder

COMMAND = Path(sys.executable).with_name("bilora-ray")
# The same, but sooner sure that the head of its cluster is gone.
IMPATIENT = """
from bilora_ray.cli.main import main
from bilora_ray.search.cluster import watchdog
watchdog.PATIENCE_S = 5.0
main()
"""
IMPATIENT_COMMAND = (sys.executable, "-c", IMPATIENT)
WAIT_TIMEOUT_S = 240
_started: list[subprocess.Popen[bytes]] = []
SPACE = """
study: {{name: {name}, num_trials: {num_trials}, seed: 3, scheduler: {scheduler}}}
trial:
  model_name_or_path: {model}
  task: causal-lm
  train_data: {data}
  max_length: 64
  max_steps: {max_steps}
  eval_steps: {eval_steps}
  per_device_train_batch_size: 8
  rho: {{low: 0.01, high: 0.2, log: true}}
  learning_rate: {{low: 0.0001, high: 0.01, log: true}}
resources: {{workers: {workers}}}
"""


@dataclass
class Search:
    """A search and what it keeps: `space.yaml`, its output in `log`, and `runs`, all in one folder.

    Attributes:
        folder: of all that.
        tiny: the model and the data.
        nodes: the cluster; None: one of its own.
        options: of every `bilora-ray tune`.
        environment: of every one, on top of this process's.
        mlflow_uri: where its runs are read; None: in `runs`.
        storage: its storage path; None: `runs`.
        command: what is `bilora-ray`.
    """

    folder: Path
    tiny: Tiny
    name: str = "s"
    num_trials: int = 2
    max_steps: int = 60
    eval_steps: int = 5
    workers: int = 1
    scheduler: str = "none"
    nodes: Nodes | None = None
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    mlflow_uri: str | None = None
    storage: Path | None = None
    command: Sequence[str | Path] = (COMMAND,)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        model, data = self.tiny.model("causal-lm"), self.tiny.folder / "texts-train.jsonl"
        (self.folder / "space.yaml").write_text(SPACE.format(**vars(self), model=model, data=data))

    @property
    def runs(self) -> Path:
        """The storage path."""
        return self.storage or self.folder / "runs"

    @property
    def layout(self) -> Layout:
        """Where it keeps what."""
        return Layout(self.runs)

    @property
    def log(self) -> str:
        """What every start of it has printed."""
        return (self.folder / "log").read_text()

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start `bilora-ray tune`."""
        command = [*self.command, "tune", "--space=space.yaml", f"--storage-path={self.runs}", *self.options, *options]
        environment = {**os.environ, **self.environment}
        if self.nodes is not None:
            command.append(f"--ray-address={self.nodes.address}")
            environment |= ENVIRONMENT
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _started.append(process)
        return process

    def ends(self, process: subprocess.Popen[bytes], timeout_s: float = WAIT_TIMEOUT_S) -> int:
        """The exit code of `process`, which is killed, with all below it, if it does not end."""
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the search does not end\n{self.log}") from None
        finally:
            kill_group(process)

    def wait(self, process: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
        """Until `condition` holds while the search `process` runs."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not condition():
            assert process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """What the study database holds now, read as another process would; empty before the study is there."""
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{self.layout.database_file}")
            return optuna.load_study(study_name=self.name, storage=storage).get_trials()
        except Exception:  # not there yet, or being made at this moment
            return []

    def reports(self) -> int:
        """How many evaluations the study knows."""
        return sum(len(trial.intermediate_values) for trial in self.trials())

    def trial(self, number: int) -> TrialFolder:
        """The folder of a trial."""
        return self.layout.trial(self.name, number)

    def has_checkpoint(self, *numbers: int) -> bool:
        """Whether each of these trials is under way: it has a checkpoint, and is not done."""
        return set(numbers) <= self.in_flight().keys()

    def in_flight(self) -> dict[int, int]:
        """Trial -> step of its newest checkpoint, of those under way."""
        steps = {}
        for number in range(self.num_trials):
            step = self.trial(number).state().get("step", 0)
            if 0 < step < self.max_steps and _goes_on(self.trial(number)):
                steps[number] = step
        return steps

    def trained_by(self, processes: Sequence[psutil.Process]) -> dict[int, psutil.Process]:
        """Trial -> which of the `processes` trains it, of those in flight."""
        locks = {str(self.trial(number).path / "lock"): number for number in self.in_flight()}
        found = {}
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update({locks[file.path]: process for file in process.open_files() if file.path in locks})
        return found

    def study(self) -> StudyView:
        """The study as a program reads it."""
        return load_study(self.layout, self.name)


def _goes_on(folder: TrialFolder) -> bool:
    """Whether a trial's last checkpoint has tensors: they are removed when it ends."""
    # Asked again, since the trial may have put a newer one in its place between two looks.
    return any((latest / TENSORS).exists() for _ in range(3) if (latest := folder.latest()))


def kill_searches() -> None:
    """Kill what is left of all searches, with all below them."""
    while _started:
        kill_group(_started.pop())
