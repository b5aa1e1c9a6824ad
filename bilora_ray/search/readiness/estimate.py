"""What a search will take: its extreme trials are measured, and then searches of such trials are run on a clock."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import TrialFailure, UserError
from bilora_ray.files import temporary_folder
from bilora_ray.measures import COSTS, CUDA_GIB
from bilora_ray.search.readiness.corners import Kind, in_words, kind_of, kinds, position
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.study.control.finalists import SEEDS
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study

if TYPE_CHECKING:
    from bilora_ray.training.probe.cost import Cost

GIB = 2**30
# Simulated trials in all: as many searches as that makes, within bounds.
TRIALS, FEWEST, MOST = 400, 4, 20
# An evaluation tells a trial's worth with so much noise, beside that of the worth among trials; less as it goes on.
NOISE = 0.5
PATIENCE = "early_stopping_patience"
# The quantiles that an interval is of.
LOW, HIGH = 0.1, 0.9


@dataclass(frozen=True)
class Interval:
    """The middle of what is expected, and where eight of ten would lie."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of what was found, one value or more."""
        ranked = sorted(values)

        def quantile(share: float) -> float:
            return ranked[min(len(ranked) - 1, int(share * len(ranked)))]

        return cls(quantile(LOW), statistics.median(ranked), quantile(HIGH))


@dataclass(frozen=True)
class Estimate:
    """What a search will take, by estimate. Seconds are of the clock.

    Attributes:
        study: its name.
        num_trials: that it has.
        at_once: so many of them run at one time.
        memory: bytes of a worker, of the smallest and of the largest trial that were measured.
        room: bytes that a worker could have.
        adapter: bytes of the largest adapter.
        trial_seconds: of one that is trained to its end.
        wall_seconds: of the search, and of its finalists.
        device_hours: of all trials and finalists, on each GPU of a worker, or on a worker that has none.
        trained: the share of the training that early stops leave.
        cost: of the device-hours, by `price_per_gpu_hour`; None without one.
        notes: lines about what this leaves out.
    """

    study: str
    num_trials: int
    at_once: int
    memory: tuple[int, int]
    room: int
    adapter: int
    trial_seconds: Interval
    wall_seconds: Interval
    device_hours: Interval
    trained: Interval
    cost: Interval | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """A kind of trials, and what its ends take."""

    kind: Kind
    low: Cost
    high: Cost

    def evaluations(self, space: Space, config: TrialConfig) -> Iterator[dict[str, float]]:
        """What each evaluation of a trial with `config` tells of its progress and its cost."""
        from bilora_ray.training.loop import eval_every, share_of

        place = position(space, config)

        def between(low: float, high: float) -> float:
            return low + place * (high - low)

        low, high, rows = self.low, self.high, config.step_rows(space.resources.workers)
        # Batches may be searched: what a row takes changes less among them than what a step does.
        step = rows * between(low.step / low.step_rows, high.step / high.step_rows)
        start, evaluation = between(low.start, high.start), between(low.evaluation, high.evaluation)
        most = max(low.train_rows, high.train_rows)
        an_epoch = math.ceil(min(config.max_train_samples or most, most) / rows)
        steps = config.max_steps or share_of(config.num_train_epochs, an_epoch)
        every = eval_every(config.eval_steps, steps)
        costs = {"adapter_mb": between(low.adapter, high.adapter) / 1e6}
        if space.resources.gpus_per_worker:
            costs["gpu_memory_gib"] = between(low.memory, high.memory) / GIB - CUDA_GIB
        for index, at in enumerate([*range(every, steps, every), steps], start=1):
            yield {
                "step": at,
                "max_steps": steps,
                "epoch": at / an_epoch,
                "num_input_tokens_seen": at * rows * between(low.row_tokens, high.row_tokens),
                "train_runtime": start + at * step + index * evaluation,
                **costs,
            }


def ends(space: Space) -> list[dict[str, Any]]:
    """The settings of the trials to be measured, two of each kind."""
    both = (end for kind in kinds(space) for end in (kind.low, kind.high))
    return [space.trial_config(end).model_dump() for end in both]


def estimate(
    space: Space,
    found: Sequence[tuple[float, Cost] | TrialFailure],
    at_once: int,
    room: int,
    started: float,
) -> Estimate:
    """What the search of `space` takes.

    Args:
        space: the space.
        found: what was measured of its `ends`, in their order: seconds of imports, and the rest.
        at_once: trials that run at one time.
        room: bytes of memory that a worker of a trial could have.
        started: seconds until the first trial could begin.

    Raises:
        UserError: a trial of the space does not fit.
    """
    all_kinds = kinds(space)
    measured = _pairs(all_kinds, found)
    costs = [cost for pair in measured for cost in (pair.low, pair.high)]
    imports = max(told[0] for told in found if isinstance(told, tuple))
    largest = max(costs, key=lambda cost: cost.memory)
    if largest.memory > room:
        where = next(pair.kind.high for pair in measured if largest in (pair.low, pair.high))
        raise UserError(
            f"estimate: a trial with {in_words(where)} takes {largest.memory / GIB:.1f} GiB, and of {at_once} at one "
            f"time each has {room / GIB:.1f} GiB; lower study.max_concurrent, the ranks or the batches"
        )
    per_trial = space.resources.workers * (space.resources.gpus_per_worker or 1)
    searches = max(FEWEST, min(MOST, TRIALS // space.study.num_trials))
    told = [_search(space, measured, at_once, seed) for seed in range(searches)]
    hours = Interval.of([(one["trained"] + one["finals"]) * per_trial / 3600 for one in told])
    # The search of the finalists starts a cluster of its own.
    starts = (started + imports) * (2 if space.study.finalists else 1)
    price = space.study.price_per_gpu_hour
    return Estimate(
        study=space.study.name,
        num_trials=space.study.num_trials,
        at_once=at_once,
        memory=(min(cost.memory for cost in costs), largest.memory),
        room=room,
        adapter=max(cost.adapter for cost in costs),
        trial_seconds=Interval.of([seconds for one in told for seconds in one["to_end"]]),
        wall_seconds=Interval.of([starts + one["wall"] + one["finals_wall"] for one in told]),
        device_hours=hours,
        trained=Interval.of([one["trained"] / sum(one["to_end"]) for one in told]),
        cost=None if price is None else Interval(*(price * hour for hour in asdict(hours).values())),
        notes=_notes(space, costs),
    )


def _pairs(all_kinds: Sequence[Kind], found: Sequence[tuple[float, Cost] | TrialFailure]) -> list[Measured]:
    pairs = []
    for index, kind in enumerate(all_kinds):
        costs = []
        for end, told in zip((kind.low, kind.high), found[2 * index : 2 * index + 2], strict=True):
            if isinstance(told, TrialFailure):
                raise UserError(f"estimate: a trial with {in_words(end)} does not run: {told}")
            costs.append(told[1])
        pairs.append(Measured(kind, *costs))
    return pairs


def _notes(space: Space, costs: Sequence[Cost]) -> tuple[str, ...]:
    notes = [line for cost in costs for line in cost.passes]
    if space.resources.workers > 1:
        notes.append(f"one of {space.resources.workers} workers was run: what they send each other takes time too")
    if space.first_config().predict_with_generate:
        notes.append("a model that has learned little writes long texts: the time of evaluations may become less")
    study = space.study
    if study.finalists:
        trainings = f"{study.finalists} x {study.finalist_seeds or SEEDS} trainings to their end"
        notes.append(f"finalists: the search, the device-hours and the cost have their {trainings} too")
    ends = [f"study.{key}" for key in ("target", "min_gain") if getattr(study, key) is not None]
    if ends:
        notes.append(f"{', '.join(ends)}: no value of a metric is known before, and the search may end sooner")
    if space.fixed.get(PATIENCE) is not None or PATIENCE in space.varied:
        notes.append(f"{PATIENCE}: trials may end sooner")
    return tuple(dict.fromkeys(notes))


def _search(space: Space, measured: Sequence[Measured], at_once: int, seed: int) -> dict[str, Any]:
    """One search of trials whose worth is drawn: seconds of the clock, of training, and of each trial to its end.

    It ends by no value of a metric, for those are drawn too, and begins from no other study. What its finalists take
    is told apart from what its trials do.
    """
    own = {"sampler": "random", "seed": seed, "name": "estimate", "warm_start": ()}
    unread = {"target": None, "min_gain": None, "finalists": 0, "finalist_seeds": None}
    copied = replace(space, study=space.study.model_copy(update=own | unread))
    full = []

    def curve(config: TrialConfig) -> list[Metrics]:
        told = _curve(copied, measured, config, random.Random(f"{seed} {config}"))
        full.append(told[-1]["train_runtime"])
        return told

    with temporary_folder() as folder:
        opened = open_study(copied, Layout(folder / "runs"), {})
        try:
            moments = simulate(opened, curve, at_once)
        finally:
            opened.release()
    best = random.Random(seed).sample(full, min(space.study.finalists, len(full)))
    finals = best * (space.study.finalist_seeds or SEEDS)
    return {
        "wall": moments[-1].clock,
        "trained": sum(moment.seconds for moment in moments),
        "to_end": full,
        "finals": sum(finals),
        "finals_wall": _clock(finals, at_once),
    }


def _clock(seconds: Sequence[float], at_once: int) -> float:
    """When all trials are done that take `seconds`, of which so many run at one time."""
    free = [0.0] * at_once
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def _curve(space: Space, measured: Sequence[Measured], config: TrialConfig, draw: random.Random) -> list[Metrics]:
    kind = kind_of([pair.kind for pair in measured], config)
    pair = next(pair for pair in measured if pair.kind is kind)
    judged = dict.fromkeys(["eval_loss", config.metric, *(one.metric for one in space.objectives)])
    worth = {metric: draw.gauss(0, 1) for metric in judged if metric not in COSTS}
    told: list[Metrics] = []
    for index, costs in enumerate(pair.evaluations(space, config), start=1):
        values = {metric: mean + NOISE * draw.gauss(0, 1) / math.sqrt(index) for metric, mean in worth.items()}
        told.append({**values, **costs})
    return told
