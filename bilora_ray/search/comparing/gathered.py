"""What the studies of a comparison say, gathered: how each entry was tuned, and each of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bilora_ray.records import TrialRecord
from bilora_ray.search.comparing.file import Comparison
from bilora_ray.search.study.control.comparisons import (
    begun_parts,
    looks_at,
    runs_by_seed,
    scores_of,
)
from bilora_ray.search.study.layout import Layout


def gathered(comparison: Comparison, layout: Layout) -> dict[str, Any]:
    """All that there is to tell of a comparison."""
    names = {entry: space.study.name for entry, space in comparison.spaces.items()}
    parts = begun_parts(layout, [*names.values(), comparison.runs], comparison.name)
    runs, tuned = parts[comparison.runs], {entry: parts[name] for entry, name in names.items()}
    scores, metric = scores_of(runs), runs.objective.metric
    found = []
    for (entry, seed), record in runs_by_seed(runs).items():
        score: Mapping[str, float] = scores.get(record.number, {})
        found.append({
            "entry": entry, "seed": seed, "quality": score.get(metric), "sharpness": score.get("sharpness"),
            "step_seconds": step_seconds(record.history), "memory_gib": memory_of(record),
            "train_seconds": record.history[-1]["train_runtime"] if record.history else None, "test": dict(score),
        })  # fmt: skip
    return {
        "name": comparison.name, "metric": metric, "baseline": comparison.baseline, "budget": comparison.config.budget,
        "looked_at": looks_at(runs), "runs": found,
        "tuned": {entry: study.best() for entry, study in tuned.items()},
    }  # fmt: skip


def step_seconds(history: Sequence[Mapping[str, float]]) -> float | None:
    """The seconds of a training step of a run, without evaluations: the median of what is between two evaluations."""
    found, step, tokens = [], 0.0, 0.0
    for metrics in history:
        steps, read = metrics["step"] - step, metrics["num_input_tokens_seen"] - tokens
        step, tokens = metrics["step"], metrics["num_input_tokens_seen"]
        if steps > 0 and metrics["tokens_per_second"] > 0:
            found.append(read / metrics["tokens_per_second"] / steps)
    return median(found) if found else None


def memory_of(record: TrialRecord) -> float | None:
    """The most GPU memory of a run, in GiB; None where there is no GPU."""
    return max((metrics["gpu_memory_gib"] for metrics in record.history if "gpu_memory_gib" in metrics), default=None)
