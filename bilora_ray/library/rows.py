"""A study as rows, for tables that a person or a program makes of it: names and numbers are whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bilora_ray.records import Objective, TrialRecord
from bilora_ray.search.space import setting_of

if TYPE_CHECKING:
    from bilora_ray.search.study.view import StudyView


def trial_rows(study: StudyView) -> list[dict[str, Any]]:
    """A row a trial, the best first: `trial`, `status`, the metrics of its adapter, the searched settings, `step`,
    `max_steps`, `seconds` of training, `parent`, `error` and `adapter`. All rows have the same keys; what is not known
    is None.
    """
    records = [*study.records_now(), *study.queued()]
    ordered = leaders(records, study.objectives, study.front(records))
    kept = {record.number: _kept(record, study.objective) for record in records}
    judged = [objective.metric for objective in study.objectives]
    metrics = dict.fromkeys([*judged, *(key for found in kept.values() for key in found if key.startswith("eval_"))])
    settings = dict.fromkeys(
        [*map(setting_of, study.space.distributions), *(key for record in records for key in record.sampled)]
    )
    return [
        {
            "trial": record.number,
            "status": record.status.value,
            **{metric: record.values.get(metric, kept[record.number].get(metric)) for metric in metrics},
            **{setting: record.sampled.get(setting) for setting in settings},
            **_how_far(record),
            "parent": None if record.parent is None else record.parent.number,
            "error": record.error or record.broken,
            "adapter": None if record.adapter is None else str(record.adapter),
        }
        for record in ordered
    ]


def evaluation_rows(study: StudyView) -> list[dict[str, Any]]:
    """A row an evaluation, in order: `trial` and all that was measured."""
    return [{"trial": record.number, **metrics} for record in study.records() for metrics in record.history]


def leaders(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], front: Sequence[TrialRecord] = ()
) -> list[TrialRecord]:
    """`records` from the best to the worst; of several objectives those on the `front` first."""
    ahead = {record.number for record in front}
    return [*front, *(record for record in objectives[0].ranked(records) if record.number not in ahead)]


def _kept(record: TrialRecord, objective: Objective) -> Mapping[str, float]:
    """The evaluation of the adapter that the trial keeps."""
    best: Mapping[str, float] | None = None
    for metrics in record.history:
        best = metrics if objective.improves(metrics, best) else best
    return best or {}


def _how_far(record: TrialRecord) -> dict[str, Any]:
    last: Mapping[str, Any] = record.history[-1] if record.history else {}
    return {"step": last.get("step"), "max_steps": last.get("max_steps"), "seconds": last.get("train_runtime")}
