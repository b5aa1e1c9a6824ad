"""What a trial takes of time and memory, by some of its steps and an evaluation, in a process of its own."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory
from bilora_ray.files import temporary_folder
from bilora_ray.measures import CUDA_GIB
from bilora_ray.training import model as models
from bilora_ray.training.compute.memory import Shortage, failure, is_out_of_memory, keep_to_share
from bilora_ray.training.distributed.workers import Workers
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.probe.roofline import wait

WARM_UP, TIMED = 2, 6
# So many rows are looked at for their length.
SAMPLE = 256
# An evaluation that is this short is measured once more: kernels are chosen at the first one.
SHORT_S = 5.0


@dataclass(frozen=True)
class Cost:
    """What one worker of a trial took. Seconds are of the clock, sizes in bytes.

    Attributes:
        start: until the first step, in a process that has had a trial of this base before.
        step: a training step, the median; of a method with costly steps among cheap ones, their mean.
        evaluation: with its checkpoint and the adapter that is written.
        step_rows: training rows of a step of all workers.
        train_rows: those that there are.
        row_tokens: of a training row, the mean of some.
        memory: the most that the process had: of the GPU with CUDA's own, or of the machine.
        adapter: the file of the adapter's weights.
        passes: in words, the passes that had no room and were made smaller; empty if all had.
    """

    start: float
    step: float
    evaluation: float
    step_rows: int
    train_rows: int
    row_tokens: float
    memory: int
    adapter: int
    passes: tuple[str, ...]


def cost(config: TrialConfig, workers: int = 1, gpus_per_worker: float = 1) -> Cost:
    """Begin the trial of `config` in a folder of its own that is gone behind it, and measure what it takes.

    Args:
        config: the settings.
        workers: who would train it together. What one of them does is run, here.
        gpus_per_worker: a part of one: then no more of its memory is used than a trial may have.

    Raises:
        UserError, MachineError, OSError, TrialFailure: as `fit`.
    """
    run: Run | None = None
    keep_to_share(gpus_per_worker)
    try:
        with temporary_folder() as folder:
            run = _begun(config, folder / "first", workers)
            run.base.end()
            run, started = None, time.perf_counter()
            run = _begun(config, folder / "second", workers)  # finds the base in memory
            return _measured(run, time.perf_counter() - started)
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = "while the model was loaded" if run is None else f"after step {run.progress.step}"
        raise failure(where, Shortage.of(error), config) from None


def _begun(config: TrialConfig, folder: Path, workers: int) -> Run:
    run = Run(config, TrialFolder(folder), Workers(planned=workers), keep_base=True)
    wait(models.device())
    return run


def _measured(run: Run, start: float) -> Cost:
    workers = run.workers.planned
    run.step_rows = run.config.step_rows(1)  # of a step the rows that are one worker's
    for _ in range(WARM_UP):
        run.train_step()
    cycles = -(-TIMED // run.optimizer.steps_per_cycle)
    step = statistics.median(_timed_cycle(run) for _ in range(cycles))
    evaluation = _timed(run.evaluate)
    if evaluation < SHORT_S:
        run.train_step()
        evaluation = _timed(run.evaluate)
    best = run.folder.best_adapter()
    return Cost(
        start=start,
        step=step,
        evaluation=evaluation / workers,
        step_rows=run.config.step_rows(workers),
        train_rows=len(run.data.train),
        row_tokens=statistics.fmean(run.data.train[row].length for row in range(min(SAMPLE, len(run.data.train)))),
        memory=_memory(),
        adapter=0 if best is None else sum(file.stat().st_size for file in best.glob("*.safetensors")),
        passes=tuple(run.room.proven.in_words()),
    )


def _timed_cycle(run: Run) -> float:
    """Seconds of a step, of as many as make a cycle of the method: it may have a costly one among cheap ones."""
    cycle = run.optimizer.steps_per_cycle
    return sum(_timed(run.train_step) for _ in range(cycle)) / cycle


def _timed(work: Callable[[], object]) -> float:
    device = models.device()
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def _memory() -> int:
    """The most bytes that this process has had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() + int(CUDA_GIB * 2**30)
    # Linux tells KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
