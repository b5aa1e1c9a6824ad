"""The sections of a page, in its order: a line a section."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilora_ray.addresses import masked
from bilora_ray.measures import CUDA_GIB
from bilora_ray.records import Status, TrialRecord
from bilora_ray.report import charts
from bilora_ray.report.blocks import Block, Code, Drawn, Image, Pictures, Table, Text
from bilora_ray.report.found import Found
from bilora_ray.report.marks import Chart
from bilora_ray.report.rows import trial_rows, window
from bilora_ray.search.study.control.causes import cause_of
from bilora_ray.search.study.control.verdict import METHOD as JUDGED
from bilora_ray.search.study.importances import INTERVALS, SHARES
from bilora_ray.words import (
    as_yaml,
    counted,
    duration,
    in_short,
    interval,
    setting_in_short,
    status_of,
    step_of,
    stops,
    telling,
    without_training,
)

GB, MB = 1e9, 1e6
# Of numbers of trials that are told in a row.
MOST_NUMBERS = 12


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: of its anchor.
        title: its heading.
        drawn: what a study shows in it.
        of_search: whether it shows what a search has tried. Finalists search nothing, nor do the runs of a comparison.
    """

    key: str
    title: str
    drawn: Callable[[Found], Iterable[Block]]
    of_search: bool = False

    def blocks(self, found: Found) -> Iterable[Block]:
        """What a study shows in it; nothing, where there is nothing to show."""
        return () if self.of_search and found.trains_anew else self.drawn(found)


@dataclass(frozen=True)
class Headline:
    """What a reader should know who reads nothing else.

    Attributes:
        metric: what is told.
        value: its value; empty where no trial is complete.
        range: its interval in words, if there is one.
        lines: what else there is to say of it.
        settings: of the best trial: name, value in short, value.
        facts: of the search, a name and a value each.
    """

    metric: str
    value: str
    range: str = ""
    lines: Sequence[str] = ()
    settings: Sequence[tuple[str, str, str]] = ()
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def headline(found: Found) -> Headline:
    """The best of a study, what it is worth, and what it gains."""
    best, facts = found.chosen, tuple(_facts(found))
    if best is None or best.value is None:
        line = _trained_anew(found) if found.trains_anew else "No trial is complete yet."
        return Headline(found.metric, "", lines=[line], facts=facts)
    verdict, value, lines = found.verdict, best.value, []
    if verdict is None:
        many = sum(record.status is Status.COMPLETE for record in found.records)
        rest = f", the luckiest of {many} that are complete" if many > 1 else ""
        lines.append(f"Trial {best.number}: a single run{rest}.")
    else:
        value, many = verdict.score, len(verdict.finalists)
        of = f"the best of {many} finalists" if many > 1 else "the only finalist"
        lines.append(f"Trial {best.number}: {of}, on {verdict.seeds} fresh seeds{verdict.beside_single()}.")
    lines += _gain(found, value)
    if verdict is not None and found.finals is not None and found.finals.test:
        told = ", ".join(f"{key.removeprefix('eval_')} {one:.6g}" for key, one in found.finals.test.items())
        lines.append(f"On the test rows, measured once: {told}.")
    if found.front:
        lines.append(f"Best by {found.metric}; {_numbers(found.front, 'trial')} on the Pareto front.")
    ends = "" if verdict is None else interval(verdict.low, verdict.high)
    settings = [(key, setting_in_short(one), as_yaml(one)) for key, one in telling(best).items()]
    return Headline(found.metric, f"{value:.4g}", ends, lines, settings, facts)


def _trained_anew(found: Found) -> str:
    if found.comparison is not None:
        told = "" if found.outcome else "; `bilora-ray compare` and --resume tell what they say"
        return f"These are the runs of comparison '{found.comparison}', of which none is the best{told}."
    return f"These are the finalists of study '{found.search}', on fresh seeds; its page judges them."


def _gain(found: Found, value: float) -> Iterator[str]:
    """What `value` gains over what is had without training."""
    base = found.baseline.get(found.metric)
    if base is None or not math.isfinite(base):
        return
    gain = found.objective.as_loss(float(base)) - found.objective.as_loss(value)
    how = f"{abs(gain):.4g} {'better' if gain > 0 else 'worse'}" if gain else "the same"
    yield f"Without training it is {in_short(float(base))} ({without_training(found.baseline)}): that is {how}."


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    yield "trials", f"{counted(found.records)} of {found.space.study.num_trials}"
    if found.seconds:
        yield "search", duration(found.seconds)
    if trained := _trained(found):
        yield "training", duration(trained)
    if found.end is not None:
        yield "ended by", found.end
    if found.runs:
        yield "state", "still running as this was written"


def _trained(found: Found) -> float:
    """Seconds of training, of all trials."""
    total = 0.0
    for record in found.records:
        if record.history:
            inherited = record.parent.seconds if record.parent is not None else 0.0
            total += record.history[-1].get("train_runtime", 0.0) - inherited
    return total


def _comparison(found: Found) -> Iterator[Block]:
    if found.outcome is None:
        return
    if found.outcome.picture is not None:
        yield Image(found.outcome.picture, "Each entry's difference to the baseline with its interval, and its runs")
    for line in found.outcome.sentences:
        yield Text(f"{line}.")
    for line in found.outcome.notes:
        yield Text(f"Note: {line}.")


def _leaderboard(found: Found) -> Iterator[Block]:
    keys = list(dict.fromkeys(key for record in found.ranked for key in record.sampled))
    lineage = any(record.parent is not None for record in found.records)
    several = len(found.objectives) > 1
    extra = [*(["from"] if lineage else []), *(["front"] if several else [])]
    columns = ["trial", "status", *extra, *(one.metric for one in found.objectives), "step", *keys]
    rows = [_row(record, found, keys, lineage, several) for record in found.ranked]
    if rows:
        yield Table(columns, rows, marked=found.ranked.index(found.chosen) if found.chosen is not None else None)
    for line in stops(found.records):
        yield Text(f"{line}.")


def _row(record: TrialRecord, found: Found, keys: Sequence[str], lineage: bool, several: bool) -> list[Any]:
    parent = "" if record.parent is None else f"{record.parent.number} at {record.parent.step}"
    cells: list[Any] = [record.number, status_of(record), *([parent] if lineage else [])]
    cells += ["yes" if record.number in found.front else ""] if several else []
    cells += [record.value, *(record.values.get(one.metric) for one in found.objectives[1:])]
    cells.append(step_of(record.history[-1]) if record.history else "")
    return cells + [record.sampled.get(key, "") for key in keys]


def _history(found: Found) -> Iterator[Block]:
    if (chart := charts.history(found)) is not None:
        yield Drawn(chart)
        yield from _beyond(found)


def _beyond(found: Found) -> Iterator[Text]:
    """How many trials are drawn at the edge, if some are."""
    values = [row["value"] for row in trial_rows(found)]
    ends = window(values, found.objective)
    beyond = sum(not ends[0] <= value <= ends[1] for value in values) if ends is not None else 0
    if beyond and ends is not None:
        worst = ends[0] if found.objective.greater_is_better else ends[1]
        trials = "A trial worse than {} lies" if beyond == 1 else f"{beyond} trials worse than {{}} lie"
        yield Text(f"{trials.format(in_short(worst))} at the edge, here and below.")


def _finalists(found: Found) -> Iterator[Block]:
    verdict = found.verdict
    if verdict is None:
        return
    if (chart := charts.finalists(found)) is not None:
        yield Drawn(chart)
    rows = [[one.trial, one.single, one.mean, interval(one.low, one.high), one.fell] for one in verdict.finalists]
    yield Table(["trial", "single run", f"mean {found.metric}", "95% interval", "worse by"], rows)
    yield Text(f"A point is the mean of {verdict.seeds} fresh seeds, a ring the single run in the search.")
    yield Text(f"{JUDGED[0].upper()}{JUDGED[1:]}.")


def _importances(found: Found) -> Iterator[Block]:
    told = found.importances
    if not found.space.distributions:
        return
    if (chart := charts.importances(found)) is not None:
        others = [key for key in found.space.distributions if key not in told.shares]
        yield Drawn(chart)
        yield Text(f"By {found.metric} after {told.rows} training rows, among {told.num_trials} trials.")
        if others:
            yield Text(f"Of {', '.join(others)} it cannot be told.")
        yield Text(f"{SHARES[0].upper()}{SHARES[1:]}; the line is {INTERVALS}.")
    elif told.unknown and len(found.records) > 1:
        yield Text(f"{told.unknown[0].upper()}{told.unknown[1:]}.")


def _slices(found: Found) -> Iterator[Block]:
    yield from _pictures(charts.slices(found))


def _maps(found: Found) -> Iterator[Block]:
    yield from _pictures(charts.maps(found))


def _parallel(found: Found) -> Iterator[Block]:
    if (chart := charts.parallel(found)) is not None:
        yield Drawn(chart)


def _curves(found: Found) -> Iterator[Block]:
    if (chart := charts.curves(found)) is not None:
        yield Drawn(chart)


def _watched(found: Found) -> Iterator[Block]:
    yield from _pictures(charts.watched(found))


def _front(found: Found) -> Iterator[Block]:
    yield from _pictures(charts.front(found))


def _examples(found: Found) -> Iterator[Block]:
    keys = ("prompt", "expected", "adapter", "base_model")
    present = [key for key in keys if any(example.get(key) is not None for example in found.examples)]
    titles = {"adapter": "the adapter", "base_model": "the base model"}
    if present:
        rows = [[_as_text(example.get(key)) for key in present] for example in found.examples]
        yield Table([titles.get(key, key) for key in present], rows, plain=True)


def _costs(found: Found) -> Iterator[Block]:
    rows = list(_amounts(found))
    if rows:
        yield Table(["", ""], rows)
    yield from _pictures(charts.costs(found))


def _amounts(found: Found) -> Iterator[list[Any]]:
    last = [record.history[-1] for record in found.records if record.history]
    if found.seconds:
        yield ["search, from its start to its end", duration(found.seconds)]
    if trained := _trained(found):
        yield ["training, all trials together", duration(trained)]
    if len(told := [metrics["train_runtime"] for metrics in last if "train_runtime" in metrics]) > 1:
        yield ["the longest trial", duration(max(told))]
    if rates := [metrics["tokens_per_second"] for metrics in last if "tokens_per_second" in metrics]:
        yield ["tokens a second, of the fastest trial", f"{max(rates):,.0f}"]
    if peaks := [metrics["gpu_memory_gib"] for metrics in last if metrics.get("gpu_memory_gib")]:
        yield ["GPU memory of a worker, at the most, with CUDA's own", f"{max(peaks) + CUDA_GIB:.1f} GiB"]
    if found.disk:
        yield ["disk", f"{found.disk / GB:.3g} GB" if found.disk >= GB else f"{found.disk / MB:.3g} MB"]
    kept = sum(record.adapter is not None and record.adapter.is_dir() for record in found.records)
    if kept:
        yield ["adapters kept", str(kept)]


def _failures(found: Found) -> Iterator[Block]:
    causes: dict[str, list[TrialRecord]] = {}
    for record in found.records:
        if record.error:
            causes.setdefault(cause_of(record.error), []).append(record)
    if causes:
        ordered = sorted(causes.values(), key=len, reverse=True)
        rows = [[len(failed), failed[-1].error, _numbers([one.number for one in failed], "")] for failed in ordered]
        yield Table(["failed", "the last line of it", "trials"], rows, plain=True)
    broken = [[record.number, record.broken] for record in found.records if record.broken]
    if broken:
        yield Table(["trial", "beyond a limit of the study"], broken)


def _made_of(found: Found) -> Iterator[Block]:
    yield Code(found.space_file)
    if found.made_with:
        yield Table(["", ""], [[key, value] for key, value in found.made_with.items()])


def _commands(found: Found) -> Iterator[Block]:
    where = f"--storage-path {shlex.quote(str(found.layout.storage_path))}"
    if found.layout.study_database is not None:
        where += f" --study-database {shlex.quote(masked(found.layout.study_database))}"
    name = shlex.quote(found.name)
    verb = "tune" if found.space.distributions else "train"
    again = ["# look again", f"bilora-ray report {name} {where}"]
    if found.comparison is not None:
        told = "# go on after an interruption, or tell of it again, with the file that it was begun with"
        yield Code("\n".join([*again, told, f"bilora-ray compare FILE.yaml {where} --resume"]))
        return
    lines = [
        *again,
        "# go on after an interruption, with the space file that it was begun with",
        f"bilora-ray {verb} --space SPACE.yaml {where} --resume",
        "# search the same once more, under another name",
        f"bilora-ray clone {name} {name}-again {where}",
        f"bilora-ray {verb} --space {name}-again.yaml {where}",
    ]
    if found.best is not None:
        lines += ["# take the adapter", f"bilora-ray export {name} {where} --output {name}-adapter"]
    if found.best is not None and found.space.distributions:
        lines += ["# train the best settings once more", f"bilora-ray train --study {name} {where} --name {name}-final"]
    yield Code("\n".join(lines))


SECTIONS = (
    Section("comparison", "Comparison", _comparison),
    Section("trials", "Trials", _leaderboard),
    Section("history", "Search history", _history, of_search=True),
    Section("finalists", "Finalists", _finalists),
    Section("mattered", "What mattered", _importances, of_search=True),
    Section("slices", "Each setting", _slices, of_search=True),
    Section("maps", "Pairs of settings", _maps, of_search=True),
    Section("parallel", "All settings", _parallel, of_search=True),
    Section("curves", "Learning curves", _curves),
    Section("front", "Pareto front", _front),
    Section("flatness", "Auxiliary and sharpness", _watched),
    Section("examples", "Examples", _examples),
    Section("costs", "Time and memory", _costs),
    Section("failures", "Failures", _failures),
    Section("made-of", "Space and versions", _made_of),
    Section("commands", "Commands", _commands),
)


def _pictures(drawn: Iterable[Chart]) -> Iterator[Block]:
    found = list(drawn)
    if len(found) == 1:
        yield Drawn(found[0])
    elif found:
        yield Pictures(found)


def _numbers(numbers: Sequence[int], of: str) -> str:
    """Numbers of trials in a row, of many the first."""
    shown = ", ".join(map(str, numbers[:MOST_NUMBERS]))
    more = f" and {len(numbers) - MOST_NUMBERS} more" if len(numbers) > MOST_NUMBERS else ""
    named = f"{of}{'s' if len(numbers) > 1 else ''} " if of else ""
    return f"{named}{shown}{more}"


def _as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else setting_in_short(value)
