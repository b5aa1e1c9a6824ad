"""What the studies of a comparison say, gathered: how each entry was tuned, and each of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from bilora_ray.evidence.outcome import HOUR_S, Outcome, Run, Tuned
from bilora_ray.measures import SHARPNESS
from bilora_ray.records import Status, TrialRecord
from bilora_ray.search.comparing.file import Comparison
from bilora_ray.search.space import Range, setting_of
from bilora_ray.search.study.control.comparisons import begun_parts, looks_at, runs_by_seed, scores_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.view import StudyView

# The outermost part of a range, in which a best value that is the outermost one tried says little of what is beyond.
EDGE = 1 / 8


def gathered(comparison: Comparison, layout: Layout) -> Outcome:
    """What there is to tell of a comparison whose runs have begun."""
    names = [*(space.study.name for space in comparison.spaces.values()), comparison.runs]
    parts = begun_parts(layout, names, comparison.name)
    runs, resources = parts[comparison.runs], parts[comparison.runs].space.resources
    devices = resources.workers * (resources.gpus_per_worker or 1)
    scores = scores_of(runs)
    return Outcome(
        name=comparison.name,
        metric=f"test_{runs.objective.metric.removeprefix('eval_')}",
        greater_is_better=runs.objective.greater_is_better,
        baseline=comparison.baseline,
        budget=comparison.config.budget,
        runs=tuple(
            _run(entry, seed, record, scores.get(record.number, {}), runs.objective.metric)
            for (entry, seed), record in runs_by_seed(runs).items()
            if record.status not in (Status.RUNNING, Status.QUEUED)
        ),
        tuned=tuple(_tuned(entry, parts[name], devices) for entry, name in zip(comparison.spaces, names, strict=False)),
        extended=bool(looks_at(runs)),
        price_per_hour=comparison.config.price_per_gpu_hour,
        devices=devices,
        seed=comparison.config.seed,
    )


def _run(entry: str, seed: int, record: TrialRecord, score: Mapping[str, float], metric: str) -> Run:
    return Run(
        entry=entry,
        seed=seed,
        quality=score.get(metric),
        sharpness=score.get(SHARPNESS),
        step_seconds=step_seconds(record.history),
        memory_gib=max((told["gpu_memory_gib"] for told in record.history if "gpu_memory_gib" in told), default=None),
        train_seconds=_seconds(record),
        forgetting=score.get("forgetting"),
        adapter_mb=record.history[-1].get("adapter_mb") if record.history else None,
    )


def _tuned(entry: str, study: StudyView, devices: float) -> Tuned:
    records, best = study.records(), study.best()
    return Tuned(
        entry=entry,
        settings={} if best is None else dict(best.sampled),
        value=None if best is None else best.value,
        trials=sum(record.status is Status.COMPLETE for record in records),
        device_hours=devices * sum(_seconds(record) or 0.0 for record in records) / HOUR_S,
        edges=() if best is None else tuple(edges(study, best, records)),
    )


def edges(study: StudyView, best: TrialRecord, records: Sequence[TrialRecord]) -> list[str]:
    """The searched numbers of which the best value is the outermost that was tried, near the end of its range."""
    found = []
    for name in study.space.parameters(best.sampled):
        part, key = study.space.distributions[name], setting_of(name)
        if not isinstance(part, Range):
            continue
        place = _place(part, float(best.sampled[key]))
        asked = (record.sampled for record in records if name in study.space.parameters(record.sampled))
        tried = [_place(part, float(sampled[key])) for sampled in asked]
        if (place <= EDGE and place <= min(tried)) or (place >= 1 - EDGE and place >= max(tried)):
            found.append(key)
    return found


def step_seconds(history: Sequence[Mapping[str, float]]) -> float | None:
    """The seconds of a training step without evaluations: the median of the means between two evaluations."""
    found, step, tokens = [], 0.0, 0.0
    for told in (told for told in history if "num_input_tokens_seen" in told):
        steps, read = told["step"] - step, told["num_input_tokens_seen"] - tokens
        step, tokens = told["step"], told["num_input_tokens_seen"]
        if steps > 0 and told["tokens_per_second"] > 0:
            found.append(read / told["tokens_per_second"] / steps)
    return median(found) if found else None


def _seconds(record: TrialRecord) -> float | None:
    return record.history[-1]["train_runtime"] if record.history else None


def _place(part: Range, value: float) -> float:
    """Where a value is in its range: 0 is the low end, 1 the high one, on its scale."""
    scale = math.log if part.log else float
    low, high = scale(part.low), scale(part.high)
    return (scale(value) - low) / (high - low)
