"""What a study's trials are told in: the same words and the same digits on the terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.settings import non_default, shown

STATUS_WORDS = {
    Status.COMPLETE: "complete",
    Status.PRUNED: "stopped early",
    Status.FAILED: "failed",
    Status.RUNNING: "running",
    Status.INTERRUPTED: "interrupted",
    Status.QUEUED: "queued",
}
# What a study's winner is compared with, by the kind of the baseline: who gets the values that are told of it.
WITHOUT_TRAINING = {
    "base-model": "the base model alone",
    "majority": "the frequency of each label alone",
    "mean": "the mean alone",
}


def status_of(trial: TrialRecord) -> str:
    """How a trial stands, in words, such as `ended by max_hours` of one that counts with what it had reached."""
    return STATUS_WORDS[trial.status] if trial.ended_by is None else f"ended by {trial.ended_by}"


def counted(records: Sequence[TrialRecord]) -> str:
    """How many trials stand how, such as `2 complete, 10 stopped early`."""
    stand = list(map(status_of, records))
    counts = {words: stand.count(words) for words in (*STATUS_WORDS.values(), *stand)}
    return ", ".join(f"{count} {words}" for words, count in counts.items() if count) or "no trials"


def without_training(baseline: Mapping[str, Any]) -> str:
    """Who has the values of a `baseline`, in words that a later version's kind does not break."""
    return WITHOUT_TRAINING.get(str(baseline.get("kind")), "no training")


def in_short(value: float | None) -> str:
    """A metric's value; empty if there is none."""
    return "" if value is None else f"{value:.4g}"


def interval(low: float | None, high: float | None) -> str:
    """The ends of an interval; empty if there is none."""
    return "" if low is None else f"{in_short(low)} to {in_short(high)}"


def setting_in_short(value: Any) -> str:
    """A setting's value in as few characters as tell it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def as_yaml(value: Any) -> str:
    """A setting's value as a space file has it, in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    # In a list, or YAML would put the end of a document behind it.
    return yaml.safe_dump([plain], default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]


def step_of(metrics: Mapping[str, float]) -> str:
    """Of how many steps an evaluation came after how many."""
    return f"{metrics['step']:.0f}/{metrics['max_steps']:.0f}"


def amount_of(unit: str, amount: float) -> str:
    """How far a trial came, such as `1,440 rows` or `0.25 epochs`."""
    return f"{amount:,.0f} {unit}" if amount == int(amount) else f"{amount:.4g} {unit}"


def duration(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def values_of(record: TrialRecord, objectives: Sequence[Objective]) -> str:
    """The values of a trial that has some, such as `eval_loss 0.5, train_runtime 31.2`."""
    assert record.value is not None
    others = (f"{one.metric} {record.values[one.metric]:.6g}" for one in objectives[1:])
    return ", ".join([f"{objectives[0].metric} {record.value:.6g}", *others])


def telling(record: TrialRecord) -> dict[str, Any]:
    """The settings that tell a trial from others: those that a search chose; without a search those not by default."""
    sampled = {key: value for key, value in record.settings.items() if key in record.sampled}
    adapters = {key: record.settings[key] for key in shown("best") if key in record.settings}
    return sampled or {**non_default(record.settings), **adapters}


def stops(records: Sequence[TrialRecord]) -> Iterator[str]:
    """After how much of what the trials that were stopped were stopped: a line a way to be, and a unit."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for unit, amount in record.stopped_after.items():
            found.setdefault((status_of(record), unit), []).append(amount)
    for (status, unit), amounts in found.items():
        first, last = (amount_of(unit, amount) for amount in (min(amounts), max(amounts)))
        which = f"{first} at the earliest, {last} at the latest" if first != last else first
        yield f"{status.capitalize()}: {len(amounts)}, after {which}"


def finite(value: Any) -> Any:
    """`value`, a JSON value, with null in the place of infinity and NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
