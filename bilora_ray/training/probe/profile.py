"""Some real steps of one trial, and what they say: where its time and its memory go, and what would make it faster.

Nothing in the loop knows of it. What is noted is when the trial's task is asked for a loss, a measure or texts, and
when a loss goes the way back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory
from bilora_ray.files import temporary_folder
from bilora_ray.measures import Task as TaskName
from bilora_ray.training import model as models
from bilora_ray.training.compute.compiled import why_not
from bilora_ray.training.compute.memory import Shortage, failure, is_out_of_memory, keep_to_share
from bilora_ray.training.compute.precision import dtype_of, of_machine
from bilora_ray.training.compute.targets import base_of
from bilora_ray.training.compute.varlen import VARLEN, may_flatten, missing, needs_no_padding
from bilora_ray.training.distributed.workers import Workers
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run, eval_every
from bilora_ray.training.probe.advice import SPARE, Seen, Suggestion, doubled, rarer, suggestions
from bilora_ray.training.probe.passes import reads_tokens
from bilora_ray.training.probe.roofline import Marks, counting, matmul_rate, wait
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Task, on_device

T = TypeVar("T")

# Steps before those that are timed: kernels are chosen, and compiled, at the first ones.
WARM_UP = 3
# Those of another size of passes, which are one warm-up later.
DOUBLED_STEPS = 2
OF_STEP = ("data", "forward", "backward", "optimizer", "other")
OF_EVALUATION = ("evaluation", "generation", "checkpoint")
# Of those, what workers share.
SHARED = ("evaluation", "generation")


@dataclass(frozen=True)
class Profile:
    """What some steps of a trial took. Times are in seconds, memory in bytes.

    Attributes:
        device: its name.
        precision: of the base weights and of what is computed with them.
        workers: who train the trial together. Where nothing else is said, the numbers are those of one of them.
        steps: that were timed: as many as were asked for, and as make whole cycles of a method whose steps differ.
        step_rows: training rows of a step of all workers.
        passes: forward passes of a step, on average.
        step_seconds: of a step, less what workers wait for each other.
        tokens_per_second: real ones, of training.
        positions_per_second: with those of padding.
        padding: the share of the positions that holds no token.
        start_seconds: until the first step: data, base model, adapters.
        trial_seconds: of the whole trial behind that, by estimate.
        trial_steps: of the whole trial.
        evaluations: of the whole trial.
        shares: of the trial's time, by part; they add up to 1.
        memory: by kind; `peak` is of all, and `free` is what is left of the device at the peak.
        operations: floating-point operations of a step that the model needs; those that are computed again don't count.
        device_rate: operations a second that a large product reaches here.
        utilisation: the share of those that a step does.
        notes: lines about what these numbers leave out.
        suggestions: settings that would gain most.
    """

    device: str
    precision: str
    workers: int
    steps: int
    step_rows: int
    passes: float
    step_seconds: float
    tokens_per_second: float
    positions_per_second: float
    padding: float
    start_seconds: float
    trial_seconds: float
    trial_steps: int
    evaluations: int
    shares: dict[str, float]
    memory: dict[str, int]
    operations: int
    device_rate: float
    utilisation: float
    notes: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class Watch:
    """Notes when the parts of a trial end, and what its passes read and keep.

    Args:
        share: of a GPU's memory, that this process may have.

    Attributes:
        marks: when.
        counter: counts operations while there is one.
        weighs: whether to count the bytes that a pass keeps for the way back.
        positions: that training passes have read since `forget`; rows, where they have no tokens.
        passes: how many those were.
        forward_operations: of them, while there was a counter.
        kept: the most bytes that one kept while they were counted.
        own: what is the model's, and is not kept for the way back.
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.marks = Marks(models.device())
        self.counter: FlopCounterMode | None = None
        self.weighs = False
        self.own: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.positions = self.passes = self.forward_operations = self.kept = 0
        self.marks.found.clear()

    def step(self, run: Run) -> None:
        """A step of `run`."""
        self.marks.mark("other")
        run.train_step()
        self.marks.mark("optimizer")

    def evaluation(self, run: Run) -> dict[str, float]:
        """Seconds of the parts of an evaluation of `run`."""
        self.forget()
        self.marks.mark("other")
        run.evaluate()
        self.marks.mark("checkpoint")
        return self.marks.seconds()

    def watched(self, task: Task) -> Task:
        """`task`, which tells when it is asked."""
        return replace(
            task,
            loss=partial(self._pass, task.loss),
            forward=partial(self._pass, task.forward),
            metrics=partial(self._behind, "evaluation", task.metrics),
            generated=partial(self._behind, "generation", task.generated),
        )

    def backward(self, inner: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The way back from a loss."""
        self.marks.mark("other")
        inner(loss, *args, **kwargs)
        self.marks.mark("backward")

    def _behind(self, name: str, compute: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        found = compute(*args, **kwargs)
        self.marks.mark(name)
        return found

    def _pass(self, compute: Callable[..., T], network: Any, batch: dict[str, Any]) -> T:
        if not torch.is_grad_enabled():  # of an evaluation
            return compute(network, batch)
        self.marks.mark("data")
        ids = batch.get("input_ids")
        self.positions += len(next(iter(batch.values()))) if ids is None else ids.numel()
        self.passes += 1
        before = self._operations()
        with self._weighed() if self.weighs else nullcontext():
            found = compute(network, batch)
        self.forward_operations += self._operations() - before
        self.marks.mark("forward")
        return found

    def _operations(self) -> int:
        return 0 if self.counter is None else int(self.counter.get_total_flops())

    @contextmanager
    def _weighed(self) -> Iterator[None]:
        """Note how many bytes a pass keeps for the way back: those of the largest one."""
        if self.marks.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            yield
            self.kept = max(self.kept, torch.cuda.memory_allocated() - before)
            return
        with keeping() as kept:
            yield
        self.kept = max(self.kept, sum(size for place, size in kept.items() if place not in self.own))


@contextmanager
def keeping() -> Iterator[dict[int, int]]:
    """The memories that autograd keeps of what the block computes -> their bytes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def profile(
    config: TrialConfig, steps: int, workers: int = 1, gpus_per_worker: float = 1, sharded: bool = False
) -> Profile:
    """Begin the trial of `config` in a folder of its own that is gone behind it, and look at so many of its steps.

    Args:
        config: the settings.
        steps: to time.
        workers: who would train it together. What one of them does is run, here.
        gpus_per_worker: a part of one: then no more of its memory is used than a trial may have.
        sharded: whether each worker would have a part of the model. Here it has all of it.

    Raises:
        UserError, MachineError, OSError, TrialFailure: as `fit`.
    """
    run: Run | None = None
    try:
        with temporary_folder() as folder:
            watch, started = Watch(keep_to_share(gpus_per_worker)), time.perf_counter()
            with watching(watch, config.task):
                run = Run(config, TrialFolder(folder / "trial"), Workers(planned=workers))
                # As many steps as of all workers; of each the rows that are one's.
                run.step_rows = config.step_rows(1)
                wait(watch.marks.device)
                return _looked_at(run, watch, steps, time.perf_counter() - started, sharded)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = "while the model was loaded" if run is None else f"after step {run.progress.step}"
        raise failure(where, Shortage.of(error), config) from None


def _looked_at(run: Run, watch: Watch, steps: int, began: float, sharded: bool) -> Profile:
    device, config, workers = watch.marks.device, run.config, run.workers.planned
    for _ in range(WARM_UP):
        watch.step(run)
    before, steps = run.window.tokens, _in_cycles(run, steps)
    of_steps = _timed(run, watch, steps)
    tokens, positions, passes = run.window.tokens - before, watch.positions, watch.passes / steps
    of_evaluation = watch.evaluation(run)
    evaluations, if_rarer = _evaluations(run, config.eval_steps), rarer(config)
    trial = {key: run.max_steps * of_steps.get(key, 0.0) / steps for key in OF_STEP}
    trial |= {key: evaluations * of_evaluation.get(key, 0.0) for key in OF_EVALUATION}
    trial |= {key: trial[key] / workers for key in SHARED}
    operations, memory = _operations(run, watch), _memory(run, watch)
    rate, total, in_steps = matmul_rate(device, dtype_of(config)), sum(trial.values()), sum(of_steps.values())
    seen = Seen(
        config=config,
        sharded=sharded,
        device=device.type,
        seconds=trial,
        passes=passes,
        padding=1 - tokens / positions if reads_tokens(run.model) else 0.0,
        operations=run.max_steps * operations,
        rate=rate,
        rate_of_bf16=_rate_of_bf16(config, device),
        memory=memory,
        with_doubled_passes=_with_doubled_passes(run, watch, memory, run.max_steps * in_steps / steps),
        kept_if_not_recomputed=_kept_if_not_recomputed(run, watch, positions / (steps * passes)),
        could_flatten=_could_flatten(run),
        could_compile=_could_compile(run, device),
        rows_to_evaluate=-(-len(run.data.validation) // workers),
        evaluations=evaluations,
        evaluations_if_rarer=None if if_rarer is None else _evaluations(run, if_rarer),
    )
    return Profile(
        device=_name(device),
        precision=config.precision,
        workers=workers,
        steps=steps,
        step_rows=config.step_rows(workers),
        passes=passes,
        step_seconds=in_steps / steps,
        tokens_per_second=tokens / in_steps,
        positions_per_second=positions / in_steps,
        padding=seen.padding,
        start_seconds=began,
        trial_seconds=total,
        trial_steps=run.max_steps,
        evaluations=evaluations,
        shares={key: value / total for key, value in trial.items()},
        memory=memory,
        operations=operations,
        device_rate=rate,
        utilisation=operations * steps / in_steps / rate,
        notes=tuple(_notes(config, workers, sharded)),
        suggestions=suggestions(seen),
    )


def _evaluations(run: Run, eval_steps: float) -> int:
    """How many the trial has, with such `eval_steps`."""
    return -(-run.max_steps // eval_every(eval_steps, run.max_steps))


def _notes(config: TrialConfig, workers: int, sharded: bool) -> Iterator[str]:
    if workers > 1:
        yield f"one of {workers} workers was run: what they send each other takes time too"
    if sharded:
        yield f"it had all of the model, of which each of {workers} would have a part: less memory, and more to send"
    if config.predict_with_generate:
        early = "a model that has learned little writes long texts"
        yield f"the time of evaluations is an upper bound: one was measured, after few steps, and {early}"


def _in_cycles(run: Run, steps: int) -> int:
    """So many steps, or as many more as make whole cycles of the method: it may have costly steps among cheap ones."""
    cycle = run.optimizer.steps_per_cycle
    return -(-steps // cycle) * cycle


def _timed(run: Run, watch: Watch, steps: int) -> dict[str, float]:
    """Seconds of so many steps, by part. What they read is counted from here on."""
    watch.forget()
    for _ in range(steps):
        watch.step(run)
    return watch.marks.seconds()


def _operations(run: Run, watch: Watch) -> int:
    """Floating-point operations of a step on average, less those that are done twice to save memory."""
    watch.forget()
    steps = _in_cycles(run, 1)
    # Of compiled blocks none would be seen.
    with torch.compiler.set_stance("force_eager"), counting() as counter:
        watch.counter = counter
        for _ in range(steps):
            watch.step(run)
        watch.counter = None
    done = int(counter.get_total_flops())
    return (done - watch.forward_operations if run.config.gradient_checkpointing else done) // steps


def _memory(run: Run, watch: Watch) -> dict[str, int]:
    """Bytes by kind. On a GPU the allocator knows; on a CPU they are those of the tensors that are counted."""
    watch.own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    watch.weighs = True
    watch.forget()
    for _ in range(_in_cycles(run, 1)):
        watch.step(run)
    watch.weighs = False
    parts = _bytes(run)
    found = {**parts, "kept_for_backward": watch.kept}
    if watch.marks.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        others = total - free - torch.cuda.memory_reserved()
        return {**found, "peak": peak, "free": int(max(0, min(total - others, watch.share * total) - peak))}
    return {**found, "peak": sum(found.values()), "free": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def _bytes(run: Run) -> dict[str, int]:
    parameters = list(run.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kinds: dict[str, list[Any]] = {
        "base_weights": [p for p in parameters if not p.requires_grad] + list(run.model.buffers()),
        "adapters": list(trained),
        "gradients": [parameter.grad for parameter in trained],
        "optimizer_state": [dict(run.optimizer.state), vars(run.optimizer)],
    }
    seen: set[int] = set()
    return {kind: sum(_new_storages(held, seen)) for kind, held in kinds.items()}


def _new_storages(held: Any, seen: set[int]) -> Iterator[int]:
    """Bytes of the memories of tensors in `held` that are not in `seen`, to which they are added."""
    if isinstance(held, Tensor):
        storage = held.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()
    elif isinstance(held, dict | list | tuple):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _new_storages(value, seen)


def _rate_of_bf16(config: TrialConfig, device: torch.device) -> float | None:
    """What a large product in bf16 reaches on a GPU that has it, where the trial computes in something else."""
    if device.type != "cuda" or config.precision == "bf16" or of_machine() != "bf16":
        return None
    return matmul_rate(device, torch.bfloat16)


def _with_doubled_passes(run: Run, watch: Watch, memory: dict[str, int], in_steps: float) -> float | None:
    """What the `in_steps` seconds of the trial's steps would be with `doubled` settings; None if that can't be had.

    It is measured, of the same rows both ways.
    """
    config, proven, step = run.config, run.room.proven.training, run.progress.step
    others = doubled(config)
    if not others or memory["kept_for_backward"] > SPARE * memory["free"]:
        return None

    def timed(cut: TrialConfig) -> tuple[float, int]:
        cut_by(run, cut)
        run.progress.step = step
        watch.step(run)
        return sum(_timed(run, watch, _in_cycles(run, DOUBLED_STEPS)).values()), watch.passes

    try:
        seconds, passes = timed(config)
        of_larger, fewer = timed(config.model_copy(update=others))
        # A pass that has no room is made smaller again, and the next ones too.
        is_doubled = run.room.proven.training == proven and fewer < passes
        return in_steps * of_larger / seconds if is_doubled else None
    except (OutOfMemory, RuntimeError, MemoryError) as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        return None
    finally:
        cut_by(run, config)
        run.room.proven.training = proven


def cut_by(run: Run, config: TrialConfig) -> None:
    """Have `run` cut its steps into passes as `config` says. How many rows a step has is settled."""
    run.gradients.config = config


def _kept_if_not_recomputed(run: Run, watch: Watch, positions: float) -> int | None:
    """Bytes that a pass of so many positions would keep for the way back without checkpointing; the last look at it."""
    if not run.config.gradient_checkpointing:
        return None
    run.model.gradient_checkpointing_disable()
    run.model.train()
    watch.forget()
    batch = run.task.collate([run.data.train[0]], run.data.tokenizer)
    try:
        with keeping() as kept:
            run.task.loss(run.network, on_device(batch, run.model))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    size = sum(size for place, size in kept.items() if place not in watch.own)
    return int(size * positions / watch.positions)


def _could_flatten(run: Run) -> bool:
    """Whether rows that are padded now could be read without padding by torch's kernel."""
    base = base_of(run.model)
    if not run.task.continues or needs_no_padding(str(base.config._attn_implementation)):
        return False
    return missing(VARLEN, dtype_of(run.config)) is None and may_flatten(base, VARLEN)


def _could_compile(run: Run, device: torch.device) -> bool:
    """Whether blocks that are not compiled could be. On a CPU it is not known to gain."""
    return device.type == "cuda" and not run.config.torch_compile and why_not(device.type) is None


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def watching(watch: Watch, name: TaskName) -> Iterator[None]:
    """Have `watch` hear of what is asked of a task, and of every way back."""
    task, inner = TASKS[name], Tensor.backward

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        watch.backward(inner, loss, *args, **kwargs)

    TASKS[name] = watch.watched(task)
    Tensor.backward = backward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TASKS[name] = task
        Tensor.backward = inner  # type: ignore[method-assign]
