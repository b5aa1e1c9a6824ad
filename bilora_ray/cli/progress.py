"""What a person watches while a search runs: trials done, running and stopped, the best so far, the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bilora_ray.tracking.records import Status, TrialRecord


class SearchProgress:
    """An observer that draws the search on a terminal, and prints nothing where there is none.

    Args:
        num_trials: how many trials the study finishes.
        metric: what trials are judged by.
        greater_is_better: whether a larger value is a better trial.
    """

    def __init__(self, num_trials: int, metric: str, greater_is_better: bool) -> None:
        self.num_trials = num_trials
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.ended: dict[int, TrialRecord] = {}
        self.ended_before = 0
        self.running: dict[int, tuple[TrialRecord, Mapping[str, float]]] = {}
        self.started = time.monotonic()
        console = Console(stderr=True)
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None

    def start(self, records: list[TrialRecord]) -> None:
        """Begin with the trials that the study holds already."""
        self.ended = {record.number: record for record in records if record.status is not Status.RUNNING}
        self.ended_before = len(self.ended)
        self.started = time.monotonic()

    def __enter__(self) -> SearchProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def trial_started(self, trial: TrialRecord) -> None:
        """Show the trial's line."""
        self.running[trial.number] = (trial, trial.history[-1] if trial.history else {})

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """Move the trial's line on."""
        self.running[trial.number] = (trial, metrics)

    def trial_ended(self, trial: TrialRecord) -> None:
        """Count the trial."""
        self.running.pop(trial.number, None)
        self.ended[trial.number] = trial

    def say(self, line: str) -> None:
        """Print a line above the picture, or on stderr where there is none."""
        console = self._live.console if self._live else Console(stderr=True)
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> Group:
        """The picture; drawn some times a second."""
        bar = Table.grid()
        bar.add_row(ProgressBar(self.num_trials, len(self.ended), width=60))
        return Group(self._headline(), bar, self._table())

    def _headline(self) -> Text:
        counts = {status: sum(t.status is status for t in self.ended.values()) for status in Status}
        text = Text(f"{len(self.ended)} of {self.num_trials} trials done", style="bold")
        text.append(f"  {counts[Status.COMPLETE]} complete, {counts[Status.PRUNED]} stopped early", style="default")
        if counts[Status.FAILED]:
            text.append(f", {counts[Status.FAILED]} failed", style="red")
        text.append(f"  {len(self.running)} running  {duration(time.monotonic() - self.started)}", style="dim")
        left = self._seconds_left()
        if left is not None:
            text.append(f", about {duration(left)} left", style="dim")
        best = self._best()
        if best is not None:
            text.append(f"\nbest so far: {self.metric} {best.value:.4g} (trial {best.number})", style="green")
        return text

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("trial", "step", self.metric, "settings"):
            table.add_column(column, no_wrap=True)
        for number, (trial, metrics) in sorted(self.running.items()):
            step = f"{metrics['step']:.0f}/{metrics['max_steps']:.0f}" if metrics else "starting"
            value = f"{metrics[self.metric]:.4g}" if metrics else ""
            table.add_row(str(number), step, value, Text(settings_in_words(trial.sampled)))
        return table

    def _best(self) -> TrialRecord | None:
        complete = [trial for trial in self.ended.values() if trial.value is not None]
        sign = -1 if self.greater_is_better else 1
        return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def _seconds_left(self) -> float | None:
        done = len(self.ended) - self.ended_before
        if done == 0:
            return None
        return (time.monotonic() - self.started) / done * (self.num_trials - len(self.ended))


def settings_in_words(sampled: Mapping[str, object]) -> str:
    """Sampled settings on one line."""
    return "  ".join(f"{key}={in_short(value)}" for key, value in sampled.items())


def in_short(value: object) -> str:
    """A setting's value in as few characters as tell it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
