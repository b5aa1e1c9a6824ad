"""Some real steps of one trial, and what they say: where its time and its memory go, and what would make it faster.

Nothing in the loop knows of it: `Probed` is a `Run` that notes when its parts end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory, first_line
from bilora_ray.files import temporary_folder
from bilora_ray.method.base import Closure
from bilora_ray.training import model as models
from bilora_ray.training.compute.gradients import Gradients
from bilora_ray.training.compute.precision import dtype_of, of_machine
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.probe.advice import SPARE, Seen, Suggestion, doubled, suggestions
from bilora_ray.training.probe.passes import reads_tokens
from bilora_ray.training.probe.roofline import Marks, matmul_rate, wait
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, on_device

# Steps before those that are timed: kernels are chosen, and compiled, at the first ones.
WARM_UP = 3
# Those of another size of passes, which are one warm-up later.
DOUBLED_STEPS = 2
OF_STEP = ("data", "forward", "backward", "optimizer", "other")
OF_EVALUATION = ("evaluation", "generation", "checkpoint")


@dataclass(frozen=True)
class Profile:
    """What some steps of a trial took. Times are in seconds, memory in bytes.

    Attributes:
        device: its name.
        precision: of the base weights and of what is computed with them.
        steps: that were timed.
        step_rows: training rows of a step.
        passes: forward passes of a step, on average.
        step_seconds: of a step.
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
        suggestions: settings that would gain most.
    """

    device: str
    precision: str
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
    suggestions: tuple[Suggestion, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class Probed(Run):
    """A `Run` that notes when its parts end, and what its passes read and keep."""

    def __init__(self, config: TrialConfig, folder: TrialFolder) -> None:
        super().__init__(config, folder)
        self.marks = Marks(models.device())
        self.counter: FlopCounterMode | None = None
        self.weigh = False
        self.tokens = self.positions = self.passes = self.forward_operations = self.kept = 0
        self.gradients: Gradients = _Noted(self)

    def train_step(self) -> None:
        """As a run's."""
        self.marks.mark("other")
        super().train_step()
        self.marks.mark("optimizer")

    def evaluate(self) -> dict[str, float]:
        """As a run's."""
        metrics = super().evaluate()
        self.marks.mark("checkpoint")
        return metrics

    def forget(self) -> None:
        """Count anew what passes read."""
        self.tokens = self.positions = self.passes = 0
        self.marks.found.clear()

    def _metrics(self) -> dict[str, float]:
        self.marks.mark("other")
        metrics = super()._metrics()
        self.marks.mark("evaluation")
        return metrics

    def operations(self) -> int:
        """Those that were counted so far."""
        return 0 if self.counter is None else int(self.counter.get_total_flops())

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """Note how many bytes a pass keeps for the way back: those of the largest one."""
        if models.device().type == "cuda":
            before = torch.cuda.memory_allocated()
            yield
            self.kept = max(self.kept, torch.cuda.memory_allocated() - before)
            return
        with keeping() as kept:
            yield
        self.kept = max(self.kept, self._size_of(kept))

    def bytes_of_first_row(self) -> int:
        """Bytes that a pass over the first row alone keeps for the way back."""
        batch = on_device(self.gradients.batch([self.data.train[0]]), self.model)
        with keeping() as kept:
            self.task.loss(self.network, batch)
        return self._size_of(kept)

    def _size_of(self, kept: dict[int, int]) -> int:
        """Bytes of what is `kept` beside the model's own parameters."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        return sum(size for place, size in kept.items() if place not in own)


class _Noted(Gradients):
    """Those of a `run`, which notes when their parts end."""

    def __init__(self, run: Probed) -> None:
        super().__init__(run.config, run.data, run.network, run.optimizer, run.workers)
        self.run = run

    def closure(self, examples: list[Example]) -> Closure:
        """As those of a run."""
        self.run.tokens += sum(example.length for example in examples)
        inner = super().closure(examples)

        def closure() -> Tensor:
            loss = inner()
            self.run.marks.mark("other")
            return loss

        return closure

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """As those of a run."""
        self.run.marks.mark("other")
        return super().batch(examples)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        run = self.run
        run.marks.mark("data")
        ids = batch.get("input_ids")
        run.positions += len(next(iter(batch.values()))) if ids is None else ids.numel()
        run.passes += 1
        before = run.operations()
        with run.weighed() if run.weigh else nullcontext():
            loss = super()._loss(batch)
        run.forward_operations += run.operations() - before
        run.marks.mark("forward")
        return loss


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


def profile(config: TrialConfig, steps: int) -> Profile:
    """Begin the trial of `config` in a folder of its own that is gone behind it, and look at so many of its steps.

    Raises:
        UserError, MachineError, OSError, TrialFailure: as `fit`.
    """
    try:
        with temporary_folder() as folder:
            started = time.perf_counter()
            run = Probed(config, TrialFolder(folder / "trial"))
            wait(run.marks.device)
            began = time.perf_counter() - started
            with _noting_backward(run), _noting_generation(run):
                return _looked_at(run, steps, began)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"out of GPU memory: {first_line(error)}") from error


def _looked_at(run: Probed, steps: int, began: float) -> Profile:
    device, config = run.marks.device, run.config
    for _ in range(WARM_UP):
        run.train_step()
    of_steps = _timed(run, steps)
    tokens, positions, passes = run.tokens, run.positions, run.passes / steps
    run.evaluate()
    of_evaluation = run.marks.seconds()
    evaluations = -(-run.max_steps // run.eval_every)
    trial = {key: run.max_steps * of_steps.get(key, 0.0) / steps for key in OF_STEP}
    trial |= {key: evaluations * of_evaluation.get(key, 0.0) for key in OF_EVALUATION}
    operations, memory = _operations(run), _memory(run)
    rate, total, in_steps = matmul_rate(device, dtype_of(config)), sum(trial.values()), sum(of_steps.values())
    seen = Seen(
        config=config,
        device=device.type,
        seconds=trial,
        passes=passes,
        padding=1 - tokens / positions if reads_tokens(run.model) else 0.0,
        operations=run.max_steps * operations,
        rate=rate,
        rate_of_bf16=_rate_of_bf16(run),
        memory=memory,
        with_doubled_passes=_with_doubled_passes(run, memory, passes),
        kept_if_not_recomputed=_kept_if_not_recomputed(run, positions / (steps * passes)),
        rows_to_evaluate=len(run.data.validation),
    )
    return Profile(
        device=_name(device),
        precision=config.precision,
        steps=steps,
        step_rows=run.step_rows,
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
        suggestions=suggestions(seen),
    )


def _timed(run: Probed, steps: int) -> dict[str, float]:
    """Seconds of so many steps, by part. What they read is counted from here on."""
    run.forget()
    for _ in range(steps):
        run.train_step()
    return run.marks.seconds()


def _operations(run: Probed) -> int:
    """Floating-point operations of a step, less those that are done twice to save memory."""
    run.forward_operations = 0
    # Of compiled blocks none would be seen.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run.counter = counter
        run.train_step()
        run.counter = None
    done = int(counter.get_total_flops())
    return done - run.forward_operations if run.config.gradient_checkpointing else done


def _memory(run: Probed) -> dict[str, int]:
    """Bytes by kind. On a GPU the allocator knows; on a CPU they are those of the tensors that are counted."""
    run.weigh, run.kept = True, 0
    run.train_step()
    run.weigh = False
    parts = _bytes(run)
    found = {**parts, "kept_for_backward": run.kept}
    if run.marks.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        others = total - free - torch.cuda.memory_reserved()
        return {**found, "peak": peak, "free": max(0, total - others - peak)}
    return {**found, "peak": sum(found.values()), "free": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def _bytes(run: Probed) -> dict[str, int]:
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


def _rate_of_bf16(run: Probed) -> float | None:
    """What a large product in bf16 reaches on a GPU that has it, where the trial computes in something else."""
    if run.config.precision == of_machine() or run.marks.device.type != "cuda":
        return None
    return matmul_rate(run.marks.device, torch.bfloat16)


def _with_doubled_passes(run: Probed, memory: dict[str, int], passes: float) -> float | None:
    """Seconds of the trial's steps where each pass has twice the rows, measured; None where that is not to be had."""
    if passes < 2 or memory["kept_for_backward"] > SPARE * memory["free"]:
        return None
    before = run.gradients.config
    run.gradients.config = before.model_copy(update=doubled(before))
    try:
        run.train_step()
        return run.max_steps * sum(_timed(run, DOUBLED_STEPS).values()) / DOUBLED_STEPS
    except torch.OutOfMemoryError:
        return None
    finally:
        run.gradients.config = before


def _kept_if_not_recomputed(run: Probed, positions: float) -> int | None:
    """Bytes that a pass of so many positions would keep for the way back without checkpointing; the last look at it."""
    if not run.config.gradient_checkpointing:
        return None
    run.model.gradient_checkpointing_disable()
    run.model.train()
    try:
        return int(run.bytes_of_first_row() * positions / max(1, run.data.train[0].length))
    except torch.OutOfMemoryError:
        return None


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def _noting_backward(run: Probed) -> Iterator[None]:
    """Have `run` note when a way back begins and ends: a loss takes it, and is anyone's tensor."""
    inner = Tensor.backward

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        run.marks.mark("other")
        inner(loss, *args, **kwargs)
        run.marks.mark("backward")

    Tensor.backward = backward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.backward = inner  # type: ignore[method-assign]


@contextmanager
def _noting_generation(run: Probed) -> Iterator[None]:
    """Have `run` note when texts begin and end to be written, of which an evaluation asks the task."""
    name, task = run.config.task, TASKS[run.config.task]

    def generated(*args: Any, **kwargs: Any) -> dict[str, float]:
        run.marks.mark("evaluation")
        metrics = task.generated(*args, **kwargs)
        run.marks.mark("generation")
        return metrics

    TASKS[name] = replace(task, generated=generated)
    try:
        yield
    finally:
        TASKS[name] = task
