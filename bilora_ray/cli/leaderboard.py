"""A study in a table: the best trials first, with what the search chose for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bilora_ray.cli.progress import STATUS_WORDS
from bilora_ray.cli.tables import TrialTable, in_short, step_of
from bilora_ray.config import TrialConfig
from bilora_ray.tracking.records import Status, TrialRecord, best_of

if TYPE_CHECKING:
    from bilora_ray.search.study import SearchStudy

STATUS_STYLE = {
    Status.COMPLETE: "green",
    Status.PRUNED: "default",
    Status.FAILED: "red",
    Status.RUNNING: "yellow",
    Status.INTERRUPTED: "yellow",
}


def ranked(records: Sequence[TrialRecord], greater_is_better: bool) -> list[TrialRecord]:
    """Complete trials by value, then those that are neither complete nor failed by theirs, then the rest."""
    sign = -1 if greater_is_better else 1

    def key(record: TrialRecord) -> tuple[int, float, float, int]:
        if record.status is Status.COMPLETE:
            order = 0
        else:
            order = 2 if record.status is Status.FAILED or record.value is None else 1
        return order, sign * (record.value or 0.0), record.loss or 0.0, record.number

    return sorted(records, key=key)


def print_leaderboard(
    console: Console, records: Sequence[TrialRecord], metric: str, greater_is_better: bool, most: int | None = None
) -> None:
    """Print the best `most` trials, or all."""
    rows = ranked(records, greater_is_better)
    table = TrialTable("trial", "status", metric, "step")
    for record in rows[:most]:
        step = step_of(record.history[-1]) if record.history else ""
        status = f"[{STATUS_STYLE[record.status]}]{STATUS_WORDS[record.status]}[/]"
        table.add(str(record.number), status, in_short(record.value), step, sampled=record.sampled)
    console.print(table)
    if most is not None and len(rows) > most:
        console.print(f"[dim]and {len(rows) - most} more[/]")
    for record in rows:
        if record.error:
            console.print(f"trial {record.number} failed: {record.error}", style="red", markup=False, highlight=False)


def print_settings(console: Console, settings: Mapping[str, Any]) -> None:
    """Print settings, one a line, as a space file has them."""
    width = max((len(key) for key in settings), default=0)
    for key, value in settings.items():
        plain = isinstance(value, str) and value.isprintable() and value == value.strip()
        text = value if plain else json.dumps(value, ensure_ascii=False)
        console.print(f"  {key:<{width}}  {text}", markup=False, highlight=False, soft_wrap=True)


def print_best(console: Console, study: SearchStudy) -> TrialRecord | None:
    """Print the best trial, how many are equal to it, and its settings; return it. Nothing if none is complete."""
    records = study.records()
    best = best_of(records, study.greater_is_better)
    if best is None:
        return None
    assert best.value is not None
    line = f"Best: trial {best.number}, {study.metric} {best.value:.6g}"
    equal = sum(record.status is Status.COMPLETE and record.value == best.value for record in records) - 1
    if equal:
        line += f" (as {equal} other{'s' if equal > 1 else ''}; its eval_loss is the lowest)"
    console.print(line, style="bold green", markup=False)
    shown = {key: value for key, value in best.settings.items() if key in best.sampled}
    print_settings(console, shown or {**non_default(best.settings), **_of_the_adapter(best.settings)})
    return best


def _of_the_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("method", "rank", "auxiliary_rank", "rho", "learning_rate")
    return {key: settings[key] for key in keys if key in settings}


def non_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial's `settings` that have not their default."""
    return {key: value for key, value in settings.items() if value != TrialConfig.model_fields[key].default}


def study_as_json(study: SearchStudy) -> dict[str, Any]:
    """A study as JSON: what `tune --json` and `show --json` print."""
    best = study.best()
    return {
        "study": study.space.study.name,
        "metric": study.metric,
        "greater_is_better": study.greater_is_better,
        "num_trials": study.space.study.num_trials,
        "best": None if best is None else as_json(best, study.metric),
        "importances": study.importances(),
        "trials": [as_json(record, study.metric) for record in study.records_now()],
    }


def as_json(record: TrialRecord, metric: str) -> dict[str, Any]:
    """A trial as JSON."""
    return {
        "number": record.number,
        "status": record.status.value,
        metric: record.value,
        "sampled": dict(record.sampled),
        "evaluations": [dict(metrics) for metrics in record.history],
        "adapter": str(record.adapter) if record.adapter else None,
        "error": record.error,
    }
