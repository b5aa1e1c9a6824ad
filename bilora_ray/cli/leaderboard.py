"""A study in a table: the best trials first, with what the search chose for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bilora_ray.cli.finalists import finals_as_json
from bilora_ray.cli.tables import TrialTable
from bilora_ray.library.rows import leaders
from bilora_ray.measures import SHARPNESS
from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.words import as_yaml, in_short, status_of, step_of, stops, telling, values_of, without_training

if TYPE_CHECKING:
    from bilora_ray.search.study.view import StudyView

STATUS_STYLE = {
    Status.COMPLETE: "green",
    Status.PRUNED: "default",
    Status.FAILED: "red",
    Status.RUNNING: "yellow",
    Status.INTERRUPTED: "yellow",
    Status.QUEUED: "dim",
}


def print_leaderboard(
    console: Console,
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    front: Sequence[TrialRecord] = (),
    most: int | None = None,
) -> None:
    """Print the best `most` trials, or all; of several objectives those on the `front` first, all of them."""
    ahead = [record.number for record in front]
    rows = leaders(records, objectives, front)
    most = None if most is None else max(most, len(ahead))
    metrics = [objective.metric for objective in objectives]
    beside = [SHARPNESS] if SHARPNESS not in metrics and any(SHARPNESS in record.values for record in rows) else []
    lineage = any(record.parent is not None for record in rows)
    columns = [*(["from"] if lineage else []), *(["front"] if len(metrics) > 1 else [])]
    table = TrialTable("trial", "status", *columns, *metrics, *beside, "step")
    for record in rows[:most]:
        step = step_of(record.history[-1]) if record.history else ""
        status = f"[{STATUS_STYLE[record.status]}]{status_of(record)}[/]"
        marked = ["yes" if record.number in ahead else ""] if len(metrics) > 1 else []
        values = [in_short(record.value), *(in_short(record.values.get(metric)) for metric in (*metrics[1:], *beside))]
        parent = "" if record.parent is None else f"{record.parent.number} at {record.parent.step}"
        marked = [*([parent] if lineage else []), *marked]
        table.add(str(record.number), status, *marked, *values, step, sampled=record.sampled)
    console.print(table)
    if most is not None and len(rows) > most:
        console.print(f"[dim]and {len(rows) - most} more[/]")
    for line in stops(records):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for record in rows:
        if record.error:
            console.print(f"trial {record.number} failed: {record.error}", style="red", markup=False, highlight=False)
        if record.broken:
            console.print(f"trial {record.number} is out: {record.broken}", markup=False, highlight=False)


def print_settings(console: Console, settings: Mapping[str, Any]) -> None:
    """Print settings, one a line, as YAML."""
    width = max((len(key) for key in settings), default=0)
    for key, value in settings.items():
        console.print(f"  {key:<{width}}  {as_yaml(value)}", markup=False, highlight=False, soft_wrap=True)


def print_best(console: Console, study: StudyView, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Print the best of `records`, which are equal to it, and its settings; return it. Nothing if none is complete."""
    best = study.objective.best_of(records)
    if best is None:
        return None
    assert best.value is not None
    front = study.front(records)
    if front:
        numbers = ", ".join(str(record.number) for record in front)
        which = "trial" if len(front) == 1 else "trials"
        line = f"Pareto front of the complete trials: {which} {numbers}"
        line += "; `export` takes the first, or what --prefer METRIC or --trial N says"
        console.print(line, markup=False, soft_wrap=True)
    line = f"Best: trial {best.number}, {values_of(best, study.objectives)}"
    others = [record for record in records if record.status is Status.COMPLETE and record is not best]
    equal = [record for record in others if record.value == best.value and not front]
    if equal:
        which = f"trial {equal[0].number}" if len(equal) == 1 else f"{len(equal)} others"
        lower = any(record.loss != best.loss for record in equal)
        line += f" (the same as {which}{', with a lower eval_loss' if lower else ''})"
    line += _beside(study, best)
    if front:
        line = line.replace("Best:", f"Best by {study.objective.metric}:")
    console.print(line, style="bold green", markup=False)
    print_settings(console, telling(best))
    return best


def _beside(study: StudyView, best: TrialRecord) -> str:
    """What the metric of the best trial is without training, if that is known."""
    found = study.baseline_of(study.config(best.number)) or {}
    value = found.get(study.objective.metric)
    return "" if value is None else f"; {without_training(found)} {value:.6g}"


def print_end(console: Console, study: StudyView) -> None:
    """Say which budget has ended the search, if one has, and how to go on."""
    end = study.end()
    if end is not None:
        line = f"Ended by {end.line}. With another {end.by}, or without one, --resume goes on."
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def study_as_json(study: StudyView) -> dict[str, Any]:
    """A study as JSON: what `tune --json` and `show --json` print."""
    from bilora_ray.search.study.control.disk import used_by
    from bilora_ray.search.study.control.finalists import finals_of
    from bilora_ray.search.study.view import search_of

    best, metric, importances, end = study.best(), study.objective.metric, study.importances(), study.end()
    finals, records = finals_of(study), [*study.records_now(), *study.queued()]
    search = search_of(study.study)
    return {
        "study": study.space.study.name,
        "metric": metric,
        "greater_is_better": study.objective.greater_is_better,
        "num_trials": study.space.study.num_trials,
        "ended_by": None if end is None else {"budget": end.by, "line": end.line},
        "warm_start": study.warm_start,
        "best": None if best is None or search is not None else as_json(best, metric),
        "baseline": study.baseline_of_best(),
        **_several_as_json(study),
        "importances": {key: share.share for key, share in importances.shares.items()},
        "importances_detail": {
            "rows": importances.rows,
            "num_trials": importances.num_trials,
            "intervals": {key: [share.low, share.high] for key, share in importances.shares.items()},
            "unknown": importances.unknown,
        },
        "disk": {"bytes": used_by(study), "adapters_removed": sum(bool(record.removed) for record in records)},
        "finalists_of": search,
        "finalists": None if finals is None else finals_as_json(finals),
        "trials": [as_json(record, metric) for record in records],
    }


def _several_as_json(study: StudyView) -> dict[str, Any]:
    """Of several objectives what they are, and the numbers of the trials on the front; nothing of one."""
    if len(study.objectives) == 1:
        return {}
    front = [record.number for record in study.front(study.records())]
    return {"objectives": [asdict(objective) for objective in study.objectives], "pareto_front": front}


def as_json(record: TrialRecord, metric: str) -> dict[str, Any]:
    """A trial as JSON."""
    return {
        "number": record.number,
        "status": record.status.value,
        metric: record.value,
        **record.values,
        "sampled": dict(record.sampled),
        "evaluations": [dict(metrics) for metrics in record.history],
        "adapter": str(record.adapter) if record.adapter else None,
        "adapter_removed": record.removed,
        "error": record.error,
        "stopped_after": dict(record.stopped_after) or None,
        "ended_by": record.ended_by,
        **({} if record.parent is None else {"parent": asdict(record.parent)}),
        **({} if record.broken is None else {"broken": record.broken}),
    }
