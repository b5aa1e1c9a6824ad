"""What a person watches while a search runs: trials done, running and stopped, the best so far, the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bilora_ray.cli.notebook import NotebookLive
from bilora_ray.cli.tables import TrialTable
from bilora_ray.records import Moving, Objective, Status, TrialRecord
from bilora_ray.training.compute.cutting import Proven
from bilora_ray.training.data.truncation import Truncation
from bilora_ray.words import amount_of, duration, in_short, status_of, step_of

# In a log, so often at the most is it said how a running trial stands.
REPORT_EVERY_S = 60.0


class SearchProgress:
    """An observer that draws the search on a terminal or in a notebook. Elsewhere it prints lines for a log: at the
    start, for each trial that ends, and now and then for one that runs.

    Args:
        num_trials: how many trials the study finishes.
        objective: what trials are judged by.
        notes: lines to show as the first trial starts.
        labels: lines to show before them.
        has_best: whether it is shown which trial is the best so far.
        starting: what is done before the first trial starts.
    """

    def __init__(
        self,
        num_trials: int,
        objective: Objective,
        notes: Sequence[str] = (),
        labels: Sequence[str] = (),
        has_best: bool = True,
        starting: str = "",
    ) -> None:
        self.num_trials = num_trials
        self.objective, self.metric = objective, objective.metric
        self.notes, self.labels, self.starting = notes, labels, starting
        self.has_best = has_best
        # A thread draws both dictionaries at any moment, so neither is changed: another one takes its place.
        self.ended: dict[int, TrialRecord] = {}
        self.running: dict[int, tuple[TrialRecord, Mapping[str, float]]] = {}
        self.moves: dict[int, Moving] = {}
        self.ended_before = 0
        self.started = time.monotonic()
        self._said_start = self._said_cut = self._heard = False
        self._said_moves: set[str] = set()
        self._said_limits: set[str] = set()
        self._reported = time.monotonic()
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | NotebookLive | None = None
        if self._console.is_jupyter:
            self._live = NotebookLive(self)
        elif self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=4)

    def start(self, records: list[TrialRecord]) -> None:
        """Begin with the trials that the study holds already."""
        self.ended = {record.number: record for record in records if record.status is not Status.RUNNING}
        self.ended_before = len(self.ended)
        self.started = time.monotonic()

    def __enter__(self) -> SearchProgress:
        if self._live:
            self._live.start()
        elif self.starting:
            self._print(self.starting)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def trial_started(self, trial: TrialRecord) -> None:
        """Show the trial's line; before the first one, what there is to say of all."""
        if not self._said_start:
            self._said_start = True
            for line in self.labels:
                self._print(line)
            for note in self.notes:
                self.say(f"Note: {note}")
            if self._live is None:
                self._print(f"{len(self.ended)} of {self.num_trials} trials done; running")
        self.running = {**self.running, trial.number: (trial, trial.history[-1] if trial.history else {})}

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """Move the trial's line on."""
        self.running = {**self.running, trial.number: (trial, metrics)}
        self._heard = True
        if self._live is None and time.monotonic() >= self._reported + REPORT_EVERY_S:
            self._reported = time.monotonic()
            self._print(
                f"trial {trial.number} at step {step_of(metrics)}, {self.metric} {in_short(metrics[self.metric])}"
            )
        for line in (*Proven.told_by(metrics).in_words(), *_not_compiled(metrics)):
            if line not in self._said_limits:
                self._said_limits.add(line)
                self.say(f"Note: trial {trial.number}: {line}")
        if "rows" in metrics and not self._said_cut:
            self._said_cut = True
            self._say_what_is_cut(Truncation.told_by(metrics), trial.settings)

    def trial_moves(self, number: int, moving: Moving) -> None:
        """Move the trial's line on between evaluations; a log hears how the first one begins, and then now and then."""
        self.moves = {**self.moves, number: moving}
        shown = self.running.get(number)
        if self._live is not None or shown is None:
            return
        begins = not self._heard and moving.what not in self._said_moves
        if begins or time.monotonic() >= self._reported + REPORT_EVERY_S:
            self._said_moves.add(moving.what)
            self._reported = time.monotonic()
            self._print(f"trial {number}: {_between(moving, first=not shown[1])}")

    def trial_ended(self, trial: TrialRecord) -> None:
        """Count the trial, if this is the first that is heard of its end."""
        self.running = {number: shown for number, shown in self.running.items() if number != trial.number}
        self.moves = {number: moving for number, moving in self.moves.items() if number != trial.number}
        known = trial.number in self.ended
        self.ended = {**self.ended, trial.number: trial}
        if self._live is None and not known:
            self._print(f"{len(self.ended)} of {self.num_trials} trials done: {self._in_words(trial)}")

    def say(self, line: str) -> None:
        """Print a line above the picture, or on stderr where there is none."""
        self._print(line, style="yellow")

    def _say_what_is_cut(self, found: Truncation, settings: Mapping[str, Any]) -> None:
        if found.cut or found.dropped:
            self.say(f"of {found.rows} rows {found.in_words(settings)}")
        for note in found.notes(settings):
            self.say(f"Note: {note}")

    def __rich__(self) -> Group:
        """The picture; drawn some times a second."""
        bar = Table.grid()
        bar.add_row(ProgressBar(self.num_trials, len(self.ended), width=60))
        return Group(self._headline(), bar, self._table() if self.running else "")

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, markup=False, soft_wrap=True)

    def _in_words(self, trial: TrialRecord) -> str:
        values = {} if trial.value is None else {self.metric: trial.value, **trial.values}
        value = "".join(f", {metric} {in_short(number)}" for metric, number in values.items())
        reason = f": {problem}" if (problem := trial.error or trial.broken) else ""
        return f"trial {trial.number} {status_of(trial)}{_how_far(trial)}{value}{reason}"

    def _headline(self) -> Text:
        counts = {status: sum(t.status is status for t in self.ended.values()) for status in Status}
        text = Text(f"{len(self.ended)} of {self.num_trials} trials done", style="bold")
        text.append(f"  {counts[Status.COMPLETE]} complete, {counts[Status.PRUNED]} stopped early", style="default")
        if counts[Status.FAILED]:
            text.append(f", {counts[Status.FAILED]} failed", style="red")
        running = f"{len(self.running)} running" if self._said_start else self.starting or "starting"
        text.append(f", {running}\n{duration(time.monotonic() - self.started)}", style="dim")
        left = self._seconds_left()
        if left is not None:
            text.append(f", about {duration(left)} left", style="dim")
        best = self.objective.best_of(self.ended.values()) if self.has_best else None
        if best is not None:
            text.append(f"\nbest so far: {self.metric} {in_short(best.value)} (trial {best.number})", style="green")
        return text

    def _table(self) -> TrialTable:
        table = TrialTable("trial", "step", self.metric)
        for number, (trial, metrics) in sorted(self.running.items()):
            moving = self.moves.get(number)
            step = "starting" if moving is None else _between(moving, first=not metrics)
            if metrics and (moving is None or moving.step < metrics["step"]):
                step = step_of(metrics)
            table.add(str(number), step, in_short(metrics.get(self.metric)), sampled=trial.sampled)
        return table

    def _seconds_left(self) -> float | None:
        done = len(self.ended) - self.ended_before
        if done == 0:
            return None
        return (time.monotonic() - self.started) / done * (self.num_trials - len(self.ended))


def _between(moving: Moving, first: bool) -> str:
    """What a trial does between evaluations, with its steps and the time until the `first` one."""
    if not moving.max_steps:
        return moving.what
    where = f"step {moving.step}/{moving.max_steps}"
    if moving.step == moving.next_evaluation or moving.what != "training":
        return f"{moving.what} at {where}"
    left = moving.seconds_left
    return f"{where}, evaluates in {duration(left)}" if first and left is not None else where


def _how_far(trial: TrialRecord) -> str:
    for unit, amount in trial.stopped_after.items():
        return f" after {amount_of(unit, amount)}"
    if trial.status is Status.COMPLETE and trial.history and not _all_steps(trial.history[-1]):
        return f" at step {step_of(trial.history[-1])}, out of patience"
    return ""


def _all_steps(metrics: Mapping[str, float]) -> bool:
    return metrics["step"] >= metrics["max_steps"]


def _not_compiled(metrics: Mapping[str, float]) -> Iterator[str]:
    if metrics.get("compiled") == 0:
        yield "torch_compile: not all blocks are compiled, or none; a dry run says what this machine lacks"
