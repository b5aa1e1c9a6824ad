"""A search on a clock of its own: the real study decides, and its trials are known already, so that none is waited for.

Whether a way to search pays is found out so, over hundreds of searches, and what a search will cost is estimated.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bilora_ray.config import TrialConfig
from bilora_ray.files import atomic_folder
from bilora_ray.records import Status
from bilora_ray.search.study.control.budget import RUN
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.training.folder import STATE, TrialFolder

Metrics = Mapping[str, float]
# Settings -> all evaluations of a trial with them, in order. Each has `step`, `max_steps`, `eval_loss`, the metric of a
# study, and `train_runtime`: seconds of training since the trial began.
Curve = Callable[[TrialConfig], Sequence[Metrics]]


@dataclass(frozen=True)
class Moment:
    """One evaluation of a simulated search.

    Attributes:
        clock: seconds since the search began.
        number: of the trial.
        metrics: what it told.
        seconds: of training that it took since the trial's evaluation before.
        status: how the trial stands after it.
    """

    clock: float
    number: int
    metrics: Metrics
    seconds: float
    status: Status


def simulate(study: SearchStudy, curve: Curve, workers: int = 4, keep: bool = False) -> list[Moment]:
    """Run all that is left of `study`, one trial a worker at a time, and say what happened, in the clock's order.

    Args:
        study: hands out trials and judges them, as in a search.
        curve: what a trial would measure.
        workers: how many trials run at one time.
        keep: whether each trial's folder gets its evaluations, as a reader of the study finds them; takes longer.
    """
    return list(moments(study, curve, workers, keep))


def moments(study: SearchStudy, curve: Curve, workers: int = 4, keep: bool = False) -> Iterator[Moment]:
    """As `simulate`, one moment after the other: who has seen enough asks for no more."""
    known: dict[int, Sequence[Metrics]] = {}
    keep = keep or study.space.study.scheduler == "pbt"  # whose trials lend what is in their folders
    before: dict[int, float] = {}
    # When the evaluation is done, of which trial, the how manieth: of equal times the earlier trial's goes first.
    due: list[tuple[float, int, int]] = []
    # The study's clock goes on where an earlier simulation of it ended.
    began, clock = study.study.user_attrs.get(RUN, {"until": 0.0})["until"], 0.0
    study.budget.clock = lambda: began + clock

    def begin(clock: float) -> None:
        for number in study.next_trials():
            known[number], before[number] = _left(study, number, curve(study.config(number)))
            heapq.heappush(due, (clock + known[number][0]["train_runtime"] - before[number], number, 0))

    for _ in range(workers):
        begin(0.0)
    while due:
        clock, number, index = heapq.heappop(due)
        told = known[number]
        seconds = told[index]["train_runtime"] - (told[index - 1]["train_runtime"] if index else before[number])
        if keep:
            _write(study.folder(number), told[: index + 1], study)
        status = study.report(number, told[index])
        yield Moment(clock, number, told[index], seconds, status)
        if status is Status.RUNNING:
            following = told[index + 1]["train_runtime"] - told[index]["train_runtime"]
            heapq.heappush(due, (clock + following, number, index + 1))
        else:
            begin(clock)


def _left(study: SearchStudy, number: int, told: Sequence[Metrics]) -> tuple[Sequence[Metrics], float]:
    """What of `told` a trial has yet to evaluate, which may go on from another's checkpoint; and the seconds before.

    Such a trial is as one that had its own settings from the beginning.
    """
    parent = study.record(number).parent
    if parent is None:
        return told, 0.0
    past = max((metrics["train_runtime"] for metrics in told if metrics["step"] <= parent.step), default=0.0)
    left = [metrics for metrics in told if metrics["step"] > parent.step]
    return [{**m, "train_runtime": m["train_runtime"] - past + parent.seconds} for m in left], parent.seconds


def _write(folder: TrialFolder, told: Sequence[Metrics], study: SearchStudy) -> None:
    """The checkpoint of a trial's newest evaluation, without weights."""
    best: Metrics | None = None
    for metrics in told:
        best = metrics if study.objective.improves(metrics, best) else best
    assert best is not None
    folder.make()
    step = int(told[-1]["step"])
    state = {"step": step, "history": [dict(metrics) for metrics in told], "best_step": int(best["step"])}
    with atomic_folder(folder.checkpoint_at(step)) as unfinished:
        (unfinished / STATE).write_text(json.dumps(state), encoding="utf-8")
    folder.keep_only(step, int(best["step"]))
