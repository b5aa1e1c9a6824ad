"""What there is to track of a trial, and who may watch a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

# The metric of an evaluation that says how many more without a gain the trial waits for, if it does not for all.
PATIENCE_LEFT = "patience_left"
# What a trial does first where it is the first of its process.
IMPORTING = "importing torch, transformers and PEFT"


def is_last(evaluation: Mapping[str, float]) -> bool:
    """Whether a trial ends by itself with this evaluation: it has made all of its steps, or is out of patience."""
    return evaluation["step"] >= evaluation["max_steps"] or evaluation.get(PATIENCE_LEFT) == 0


class Status(Enum):
    """Where a trial stands. The words are the same on the terminal, in JSON and in MLflow's tags."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"


@dataclass(frozen=True)
class Parent:
    """What a trial goes on from that did not begin by itself.

    Attributes:
        number: of the trial whose checkpoint it has.
        step: after which that was written.
        rung: at which both trials were compared, from 1.
        seconds: for which its parent had trained until then, with what that had itself gone on from.
        replaces: the number of the trial that was stopped there, whose place it has.
    """

    number: int
    step: int
    rung: int
    seconds: float
    replaces: int


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
        removed: the setting of the study for which the adapter was removed; then there is no folder.
        error: why it failed, one line.
        values: of each of the study's metrics, and sharpness where it is measured, all with that adapter; empty
            before the first evaluation.
        broken: the limits of the study that it does not keep to, one line.
        stopped_after: unit -> how much of it the trial had had when it was stopped or ended early; empty if it was not.
        ended_by: the budget of the study that ended it early, or `stop`: it is complete with what it had reached.
        parent: what it goes on from; None: it began by itself. Its history, its value and its adapter are its own.
    """

    number: int
    status: Status
    settings: Mapping[str, Any]
    sampled: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    value: float | None = None
    loss: float | None = None
    adapter: Path | None = None
    removed: str | None = None
    error: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    broken: str | None = None
    stopped_after: Mapping[str, float] = field(default_factory=dict)
    parent: Parent | None = None
    ended_by: str | None = None


@dataclass(frozen=True)
class Untrained:
    """What an adapter is compared with.

    Attributes:
        baseline: `kind`, and metrics by name: of the base model alone (`base-model`) where texts are written; else the
            metric of the settings where the answer is always the same one (`majority`, `mean`). None: not asked for.
        examples: of some validation rows the `prompt`, what is `expected`, and what the `adapter` and the `base_model`
            make of it, None of the latter if its head is random; with the adapter's `probability` of a label.
    """

    baseline: dict[str, Any] | None
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Objective:
    """What evaluations and trials are judged by, and which of two is the better one.

    Attributes:
        metric: of an evaluation, such as `eval_loss`.
        greater_is_better: whether the larger value is the better one.
    """

    metric: str
    greater_is_better: bool

    def as_loss(self, value: float) -> float:
        """`value` with the sign that makes the lower of two the better one."""
        return -value if self.greater_is_better else value

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` is strictly better than `best`. NaN never is; any number is better than None or NaN."""
        if math.isnan(value):
            return False
        return best is None or math.isnan(best) or self.as_loss(value) < self.as_loss(best)

    def best_value(self, values: Iterable[float]) -> float | None:
        """The best of `values`; None if there is none, or nothing but NaN."""
        best = None
        for value in values:
            best = value if self.is_better(value, best) else best
        return best

    def improves(self, evaluation: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        """Whether an evaluation is better than the `best` one; of equal ones that with the lower `eval_loss` is."""
        value = evaluation[self.metric]
        if best is None or value != best[self.metric]:
            return self.is_better(value, None if best is None else best[self.metric])
        return Objective("eval_loss", greater_is_better=False).is_better(evaluation["eval_loss"], best["eval_loss"])

    def in_vain(self, evaluations: Iterable[Mapping[str, float]], threshold: float) -> int:
        """How many evaluations there were since the last that was better by more than `threshold` than all before it.

        As transformers' EarlyStoppingCallback counts: what is better by less is what the next ones are compared with.
        """
        best, count = None, 0
        for evaluation in evaluations:
            value = evaluation[self.metric]
            better = self.is_better(value, best)
            count = 0 if better and (best is None or abs(value - best) > threshold) else count + 1
            best = value if better else best
        return count

    def rank(self, record: TrialRecord) -> tuple[float, float, int]:
        """What sorts trials from the best to the worst: the value, of equal ones the loss, then the number."""
        value = math.inf if record.value is None else self.as_loss(record.value)
        return value, math.inf if record.loss is None else record.loss, record.number

    def ranked(self, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Complete trials by value, then those that have an adapter by its value, however they ended, then the rest."""
        return sorted(records, key=lambda record: (record.status is not Status.COMPLETE, *self.rank(record)))

    def best_of(self, records: Iterable[TrialRecord]) -> TrialRecord | None:
        """The complete trial with the best value; of equals the one with the lowest loss, then the earliest."""
        complete = (record for record in records if record.status is Status.COMPLETE)
        return min(complete, key=self.rank, default=None)


@dataclass(frozen=True)
class Served:
    """What MLflow is told of an adapter that it shall load.

    Attributes:
        loader: the module that loads it.
        inputs: the columns of a question, in order.
        texts: whether all of these are texts, and the answer is one.
        config: what a user of the model may decide anew, with its values.
        facts: what there is to know of it: base model, its revision, task, licence.
        example: a question, by column; None: none is known.
        write: writes the adapter, as it is exported, to a new folder.
        kind: of what it is: a whole model stands for itself.
    """

    loader: str
    inputs: tuple[str, ...]
    texts: bool
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    example: Mapping[str, Any] | None
    write: Callable[[Path], object]
    kind: Literal["adapter", "model"] = "adapter"


@dataclass(frozen=True)
class Moving:
    """What a trial does between its evaluations.

    Attributes:
        what: it does, in words.
        step: the steps that it has made.
        max_steps: all that it is to make; 0: not known yet.
        next_evaluation: the step that ends with one.
        step_seconds: of a step, the mean of those of this start; 0 before the first one.
    """

    what: str
    step: int = 0
    max_steps: int = 0
    next_evaluation: int = 0
    step_seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until the next evaluation begins; None before that can be told."""
        return (self.next_evaluation - self.step) * self.step_seconds if self.step_seconds else None


class Observer(Protocol):
    """Watches a search. The search goes on whatever an observer does; it never waits long for one."""

    def trial_started(self, trial: TrialRecord) -> None:
        """A trial begins, or goes on after an interruption."""

    def trial_reported(self, trial: TrialRecord, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""

    def trial_ended(self, trial: TrialRecord) -> None:
        """A trial is complete, pruned or failed."""
