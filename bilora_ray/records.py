"""What there is to track of a trial, and who may watch a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

# Fewer complete trials say nothing of which setting mattered.
LEAST_FOR_IMPORTANCES = 4


class Status(Enum):
    """Where a trial stands. The words are the same on the terminal, in JSON and in MLflow's tags."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study database and the trial's folder know it.

    Attributes:
        number: of the trial in its study, from 0.
        status: where it stands.
        settings: all of its settings that its method reads.
        sampled: those that the search chose.
        history: the metrics of each evaluation, in order; each has `step`.
        value: of the study's metric with the best adapter so far; None before the first evaluation.
        loss: `eval_loss` of that adapter.
        adapter: its folder.
        error: why it failed, one line.
    """

    number: int
    status: Status
    settings: Mapping[str, Any]
    sampled: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    value: float | None = None
    loss: float | None = None
    adapter: Path | None = None
    error: str | None = None

    def rank(self, greater_is_better: bool) -> tuple[float, float, int]:
        """What sorts trials from the best to the worst: the value, of equal ones the loss, then the number."""
        sign = -1 if greater_is_better else 1
        value = math.inf if self.value is None else sign * self.value
        return value, math.inf if self.loss is None else self.loss, self.number


def best_of(records: Iterable[TrialRecord], greater_is_better: bool) -> TrialRecord | None:
    """The complete trial with the best value; of equals the one with the lowest loss, then the earliest."""
    complete = [record for record in records if record.status is Status.COMPLETE]
    return min(complete, key=lambda record: record.rank(greater_is_better), default=None)


class Observer(Protocol):
    """Watches a search. The search goes on whatever an observer does; it never waits long for one."""

    def trial_started(self, trial: TrialRecord) -> None:
        """A trial begins, or goes on after an interruption."""

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""

    def trial_ended(self, trial: TrialRecord) -> None:
        """A trial is complete, pruned or failed."""
