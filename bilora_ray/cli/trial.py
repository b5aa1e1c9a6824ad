"""One trial of a study, on the terminal and in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from bilora_ray.cli.leaderboard import as_json, print_settings
from bilora_ray.records import Status, TrialRecord, is_last
from bilora_ray.settings import non_default
from bilora_ray.words import amount_of, duration, in_short, status_of, step_of

if TYPE_CHECKING:
    from bilora_ray.search.study.view import StudyView


def one_trial(study: StudyView, number: int) -> TrialRecord:
    """The trial `number`, as it stands now. UserError if there is none."""
    for record in (*study.records_now(), *study.queued()):
        if record.number == number:
            return record
    return study.chosen(number)  # which says what numbers there are


def trial_as_json(study: StudyView, record: TrialRecord) -> dict[str, Any]:
    """A trial as JSON: what it has among others, all of its settings, where its files are, and why it ended."""
    return {
        "study": study.space.study.name,
        **as_json(record, study.objective.metric),
        "settings": dict(record.settings),
        "folder": str(study.folder(record.number).path),
        "why": why(record),
        "children": children_of(study, record.number),
    }


def print_trial(console: Console, study: StudyView, record: TrialRecord) -> None:
    """Print a trial: how it stands and why, its settings, its evaluations, where its files are."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, soft_wrap=True)

    say(f"Trial {record.number} of study '{study.space.study.name}': {status_of(record)}", "bold")
    if reason := why(record):
        say(f"Why: {reason}")
    for line in _lineage(study, record):
        say(line)
    if record.values:
        say("Its adapter: " + ", ".join(f"{metric} {value:.6g}" for metric, value in record.values.items()), "green")
    if record.history and (seconds := record.history[-1].get("train_runtime")) is not None:
        say(f"Trained for {duration(seconds)}, to step {step_of(record.history[-1])}")
    console.print()
    if record.status is Status.QUEUED:
        say("Settings that were asked for:" if record.sampled else "No settings were asked for.")
    else:
        say("Settings that the search chose:" if record.sampled else "The search chose no setting.")
    print_settings(console, record.sampled)
    others = {key: value for key, value in non_default(record.settings).items() if key not in record.sampled}
    if others:
        say("Others that have not their default:")
        print_settings(console, others)
    if record.history:
        console.print()
        console.print(_curve(study, record))
    folder = study.folder(record.number)
    checkpoint = folder.latest()
    for what, place in (("Adapter", record.adapter), ("Checkpoint", checkpoint), ("Folder", folder.path)):
        if place is not None and place.exists():
            say(f"{what:<10}  {place}")
    if record.removed:
        say(f"{'Adapter':<10}  removed by study.{record.removed}")


def why(record: TrialRecord) -> str | None:
    """Why a trial ended, or does not go on; None while it runs, and of one that has made all of its steps."""
    if record.error or record.broken:
        return record.error or record.broken
    after = " and ".join(amount_of(unit, amount) for unit, amount in record.stopped_after.items())
    if record.ended_by is not None:
        return f"ended by {record.ended_by}" + (f" after {after}" if after else "")
    if record.status is Status.PRUNED:
        return "the scheduler stopped it" + (f" after {after}" if after else "")
    if record.status is Status.COMPLETE and record.history:
        last = record.history[-1]
        if last["step"] < last["max_steps"] and is_last(last):
            return "it is out of patience"
    return {
        Status.INTERRUPTED: "its search ended before it did; --resume goes on with it",
        Status.QUEUED: "it waits to be begun; `bilora-ray stop STUDY --trial N` drops it",
    }.get(record.status)


def children_of(study: StudyView, number: int) -> list[int]:
    """The trials that go on from a checkpoint of trial `number`."""
    found = (*study.records(), *study.queued())
    return [record.number for record in found if record.parent is not None and record.parent.number == number]


def _lineage(study: StudyView, record: TrialRecord) -> list[str]:
    lines = []
    if (parent := record.parent) is not None:
        lines.append(f"It goes on from trial {parent.number} at step {parent.step}, in the place of {parent.replaces}")
    if children := children_of(study, record.number):
        lines.append(f"Trials that go on from it: {', '.join(map(str, children))}")
    return lines


def _curve(study: StudyView, record: TrialRecord) -> Table:
    """A row an evaluation; the one whose adapter is kept is marked."""
    metrics = dict.fromkeys([*(one.metric for one in study.objectives), "eval_loss", "train_loss"])
    shown = [metric for metric in metrics if any(metric in told for told in record.history)]
    best: Mapping[str, float] | None = None
    for told in record.history:
        best = told if study.objective.improves(told, best) else best
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", *shown, ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for told in record.history:
        values = [in_short(told.get(metric)) for metric in shown]
        table.add_row(step_of(told), *values, "kept" if told is best else "")
    return table
