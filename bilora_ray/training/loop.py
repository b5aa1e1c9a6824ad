"""The training loop: `fit` runs one trial from its settings to its best adapter.

It knows a `report` callable, a folder and torch; whoever calls it (a script, a Ray Tune process) decides what a report
means, whether the trial goes on after it, and how many workers call it together. A trial that was killed goes on from
its last checkpoint with the same losses as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from bilora_ray.checking import completed
from bilora_ray.config import TrialConfig
from bilora_ray.digests import BASE, CHAT_TEMPLATE, check_unchanged, of_base, of_template
from bilora_ray.errors import MachineError, NonFiniteLoss, OutOfMemory, UserError
from bilora_ray.facts import STARTING
from bilora_ray.files import atomic_folder
from bilora_ray.method import primary_parameters
from bilora_ray.method.primaries import Start, begin, gradient_starts, keep_start, principal_starts
from bilora_ray.paths import cached_commit
from bilora_ray.recipe import PAD, TEMPLATE, write_recipe
from bilora_ray.records import PATIENCE_LEFT, Moving, is_last
from bilora_ray.settings import AMID
from bilora_ray.training import model as models
from bilora_ray.training.checkpoint import load_checkpoint, save_checkpoint
from bilora_ray.training.compute.compiled import Compiled
from bilora_ray.training.compute.cutting import Proven
from bilora_ray.training.compute.gradients import Gradients, LateLosses
from bilora_ray.training.compute.memory import Room, Shortage, failure, in_room, is_out_of_memory, release
from bilora_ray.training.compute.precision import resolved, use_tensor_cores
from bilora_ray.training.data.batches import train_batch
from bilora_ray.training.data.truncation import Truncation
from bilora_ray.training.distributed.parallel import Network, collected, shard
from bilora_ray.training.distributed.workers import ALONE, Workers, seed_worker
from bilora_ray.training.evaluate import evaluate
from bilora_ray.training.folder import CHANGED, TENSORS, TrialFolder
from bilora_ray.training.loading import Loaded, load_data
from bilora_ray.training.probe import adversary
from bilora_ray.training.probe.passes import check_passes, check_tokens
from bilora_ray.training.probe.sharpness import Rows
from bilora_ray.training.result import result_of
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, Model, Task, weighted

# Of so many rows, those that the training begins with, is the gradient that LoRA-GA begins with: its authors' default.
LORA_GA_ROWS = 128

# Takes an evaluation, and says whether the trial shall go on. To say nothing, as 0.1.0 had it, is yes.
Report = Callable[[dict[str, float]], bool]
# Takes what is done between evaluations, after each step too.
Tell = Callable[[Moving], None]


@dataclass
class Progress:
    """What a run has done so far: all of it that is neither a tensor nor a random state, as JSON holds it."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    train_runtime: float = 0.0
    num_input_tokens_seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    proven: dict[str, int | None] = field(default_factory=dict)


@dataclass
class Window:
    """What has been since the last evaluation: the losses, sums over the steps, their seconds, and when it began."""

    losses: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def train_loss(self) -> float:
        """The mean loss; 0 before the first step. This waits for the GPU, once."""
        total = 0.0
        for loss in torch.stack(self.losses).tolist() if self.losses else ():
            total += loss  # sum() rounds in another way from Python 3.12 on
        return total / max(1, len(self.losses))


class Run:
    """One trial's whole state: model, optimizer, schedule, data and progress.

    Args:
        config: the settings.
        folder: where checkpoints and the best adapter go.
        workers: who train it together. Each has such a state, and the first one writes.
        digests: see `fit`.
        keep_base: see `fit`.
        tell: see `fit`.
    """

    def __init__(
        self,
        config: TrialConfig,
        folder: TrialFolder,
        workers: Workers = ALONE,
        digests: Mapping[str, str] | None = None,
        keep_base: bool = False,
        tell: Tell = lambda _: None,
    ) -> None:
        begun = workers.gather(folder.state())[0].get("settings", {}).get("precision")
        self.config = config = resolved(config, workers, begun)
        self.task = TASKS[config.task]
        self.folder = folder
        self.workers = workers
        folder.make()
        use_tensor_cores()
        if torch.cuda.is_available():  # this process may have had another trial before
            release()
            torch.cuda.reset_peak_memory_stats()
        tell(Moving("reading the data"))
        self.data: Loaded = load_data(config, shared=folder.examples)
        self.config = config.model_copy(update={"format": self.data.format})
        self.digests = {**self.data.digests, BASE: of_base(config), CHAT_TEMPLATE: of_template(config)}
        check_unchanged(config, digests or {}, self.digests)
        tell(Moving("loading the base model"))
        self.base = models.take_base(config, self.data.tokenizer, self.data.label_names, workers, keep_base)
        self._check_base()
        self.left = result_of(config)
        self.model = self.left.begin(self.base.begin(), config, self.base.fresh)
        self.optimizer = models.build_optimizer(self.model, config, self._place)
        if config.gradient_checkpointing:
            models.enable_gradient_checkpointing(self.model)
        self.started = self._begin_primary(tell)
        self.compiled = Compiled(self.model, models.device(), config.torch_compile)
        self.network = Network(self.model, workers)
        keep_start(self.model)
        self.room = Room(self.config, workers, folder.passes)
        self.room.agree()
        self.gradients = Gradients(
            self._trained_task(), self.data.tokenizer, self.network, self.optimizer, self.room, models.device()
        )
        self.step_rows = config.step_rows(workers.planned)
        self.max_steps = config.max_steps or share_of(config.num_train_epochs, self.steps_per_epoch)
        self.optimizer.total_steps = self.max_steps
        self.eval_every = eval_every(config.eval_steps, self.max_steps)
        self.schedule = get_scheduler(
            config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=share_of(config.warmup_ratio, self.max_steps),
            num_training_steps=self.max_steps,
        )
        # Methods draw differently many numbers while they are built; dropout must not depend on that.
        seed_worker(config.seed, workers.rank)
        self.learning_rate = 0.0
        self.adapter_mb = self.left.megabytes(self.model)
        self.losses = LateLosses()
        self.progress = Progress()
        self.window = Window()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training rows; the last one may have fewer rows."""
        return math.ceil(len(self.data.train) / self.step_rows)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. UserError if it is of a trial with other settings."""
        state = self.workers.gather(self.folder.state())[0]
        stored = state.get("settings")
        if stored is not None:
            # A setting that is new since then had its default's effect.
            stored = {**completed(TrialConfig, stored), **_allowed(state.get(CHANGED, {}))}
        if stored is not None and stored != self._settings():
            raise UserError(f"{self.folder.path}: holds a trial with other settings; move it away")
        groups = [dict(group) for group in self.optimizer.param_groups]
        restored = load_checkpoint(self.folder, self.model, self.optimizer, self.workers)
        if restored is None:
            if not self.started:
                raise MachineError(f"{self.folder.path}: its checkpoint was there a moment ago and is gone")
            return
        state = restored
        del state["settings"]
        schedule = state.pop("schedule")
        if state.pop(CHANGED, None):
            schedule |= self._of_own_settings(groups, schedule["last_epoch"])
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.progress = Progress(**state)
        if "num_input_tokens_seen" not in state:  # an earlier version did not count them
            rows = (row for step in range(self.progress.step) for row in self._rows_of(step))
            self.progress.num_input_tokens_seen = sum(row.length for row in rows)
        if not self.room.cannot_retry:  # else what was learned since then is why there was another start
            self.room.proven = Proven(**self.progress.proven)
        self.gradients.agree()
        self.progress.resumed_at.append(self.progress.step)

    def _of_own_settings(self, groups: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """Give the optimizer, restored from another trial's checkpoint, what this one's settings say.

        Args:
            groups: the optimizer's, as this trial's settings made them.
            step: of the checkpoint.

        Returns:
            What the schedule gets of the same.
        """
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in own.items() if key in AMID or key == "initial_lr"})
        bases, courses = self.schedule.base_lrs, self.schedule.lr_lambdas
        rates = [base * course(step) for base, course in zip(bases, courses, strict=True)]
        return {"base_lrs": bases, "_last_lr": rates}

    def train_step(self) -> None:
        """One optimizer step over `step_rows` rows. NonFiniteLoss if the loss of the step before is NaN or infinite."""
        started = time.perf_counter()
        self.model.train()
        self.learning_rate = self.schedule.get_last_lr()[0]
        examples = self._next_rows()
        with self.compiled.at_work():
            loss = self.optimizer.step(self.gradients.closure(examples))
        assert loss is not None
        self.schedule.step()
        self.progress.step += 1
        self.losses.add(self.progress.step, loss)
        self.window.losses.append(loss.detach())
        self.window.tokens += sum(example.length for example in examples)
        self.window.seconds += time.perf_counter() - started

    def moving(self, what: str) -> Moving:
        """What the trial does now, with the speed of its steps since the last evaluation."""
        step, window = self.progress.step, self.window
        following = min(self.max_steps, (step // self.eval_every + 1) * self.eval_every)
        return Moving(what, step, self.max_steps, following, window.seconds / max(1, len(window.losses)))

    def evaluation_due(self) -> bool:
        """Whether the current step ends with an evaluation; the last one does."""
        return self.progress.step % self.eval_every == 0 or self.progress.step == self.max_steps

    @property
    def is_over(self) -> bool:
        """Whether there is no step left, or no patience."""
        history = self.progress.history
        return self.progress.step >= self.max_steps or (bool(history) and is_last(history[-1]))

    def evaluate(self) -> dict[str, float]:
        """Measure the primary adapter on the validation rows, keep it if it is the best, and write a checkpoint.

        Returns:
            The metrics to report. `train_loss` is at the perturbed weight, `eval_loss` is not: do not compare them.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; then nothing is written.
        """
        self.losses.check_all()
        metrics = self._metrics()
        self.network.reshard()
        progress = self.progress
        progress.train_runtime += time.perf_counter() - self.window.started
        metrics["train_runtime"] = progress.train_runtime
        progress.num_input_tokens_seen += self.window.tokens
        metrics["num_input_tokens_seen"] = progress.num_input_tokens_seen
        # From here on it is the next window's time: what is written below is part of training.
        self.window = Window()
        best = next((past for past in progress.history if past["step"] == progress.best_step), None)
        if self.config.objective.improves(metrics, best):
            progress.best_value, progress.best_step = metrics[self.config.metric], progress.step
            self._export(self.folder.adapter_at(progress.step))
        if self.config.early_stopping_patience is not None:
            told, threshold = [*progress.history, metrics], self.config.early_stopping_threshold
            vain = self.config.objective.in_vain(told, threshold)
            metrics[PATIENCE_LEFT] = max(0, self.config.early_stopping_patience - vain)
        progress.history.append(metrics)
        progress.proven = vars(self.room.proven).copy()
        state = {**vars(progress), "schedule": self.schedule.state_dict(), "settings": self._settings()}
        save_checkpoint(self.folder.checkpoint_at(progress.step), self.model, self.optimizer, state, self.workers)
        if self.workers.is_first:
            self.folder.keep_only(progress.step, progress.best_step or progress.step)
        return metrics

    def _check_base(self) -> None:
        model, config, tokenizer = self.base.model, self.config, self.data.tokenizer
        check_tokens(model, config, tokenizer, chain(self.data.train, self.data.validation))
        # All of the settings that its passes are looked at for, beside those that it is loaded by.
        sizes = (config.per_device_train_batch_size, config.tokens_per_pass, config.per_device_eval_batch_size)
        read = (*sizes, config.predict_with_generate, config.writes_several)
        if not self.workers.sharded and read not in self.base.passed:  # whose other workers have no weights yet
            check_passes(model, config, tokenizer)
            self.base.passed.add(read)

    def _begin_primary(self, tell: Tell) -> bool:
        """Give a primary with a start its first factors; False: a checkpoint has them."""
        newest = self.folder.latest()
        if self.workers.gather(newest is not None and (newest / TENSORS).exists())[0]:
            return False
        if self.config.primary in STARTING:
            tell(Moving("beginning the primary"))
            torch.manual_seed(self.config.seed)
            begin(self.model, self._starts())
        return True

    def _starts(self) -> Iterable[Start]:
        if self.config.primary == "pissa":
            return principal_starts(self.model)
        first = train_batch(len(self.data.train), LORA_GA_ROWS, self.config.seed, epoch=0, index=0)
        examples = [self.data.train[row] for row in first]
        rows = Rows(self.model, examples, self.config, self.data.tokenizer, self._trained_task())
        return gradient_starts(self.model, rows.gradient())

    def _settings(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "workers": self.workers.planned}

    def _with_labels(self) -> TrialConfig:
        return self.config.model_copy(update={"label_names": self.data.label_names})

    def _next_rows(self) -> list[Example]:
        return self._rows_of(self.progress.step)

    def _rows_of(self, step: int) -> list[Example]:
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = train_batch(len(self.data.train), self.step_rows, self.config.seed, epoch, index)
        return [self.data.train[row] for row in rows]

    def _trained_task(self) -> Task:
        if self.config.class_weights is None:
            return self.task
        return weighted(self.task, self.data.train, len(self.data.label_names or ()))

    def _place(self, model: Model) -> None:
        if self.workers.sharded:
            shard(model, self.workers)

    def _metrics(self) -> dict[str, float]:
        window, step = self.window, self.progress.step
        metrics = {
            "step": step,
            "max_steps": self.max_steps,
            "epoch": step / self.steps_per_epoch,
            "learning_rate": self.learning_rate,
            "train_loss": window.train_loss,
            "tokens_per_second": window.tokens / max(1e-9, window.seconds),
            "adapter_mb": self.adapter_mb,
            **Truncation.of(self.data.truncation.values()).metrics(),
        }
        if torch.cuda.is_available():
            # With what the allocator keeps: that is what a trial with a part of a GPU may have no more of.
            metrics["gpu_memory_gib"] = max(self.workers.gather(torch.cuda.max_memory_reserved() / 2**30))
        metrics |= self.optimizer.metrics() | self.compiled.metrics()
        with in_room(self.room), self.compiled.away():
            metrics |= evaluate(
                self.network.evaluated, self.data.validation, self._with_labels(), self.data.tokenizer, self.workers
            )
            for loss in (metrics["train_loss"], metrics["eval_loss"]):
                if not math.isfinite(loss):
                    raise NonFiniteLoss(step, loss)
            metrics |= self._adversity()
        self.gradients.agree()
        metrics |= self.room.proven.metrics()
        return metrics

    def _adversity(self) -> dict[str, float]:
        """What the perturbation is worth, if it is time to look. The first worker does, and all know it."""
        step = self.progress.step
        if self.workers.sharded or not adversary.is_due(
            self.config, step, (step - 1) // self.eval_every * self.eval_every
        ):
            return {}
        found: dict[str, float] = {}
        if self.workers.is_first:
            model, validation = self.network.evaluated, self.data.validation
            rows = Rows(model, validation, self.config, self.data.tokenizer, self.gradients.task)
            batches = self._rows_of(step - 1), self._rows_of(step)
            found = adversary.look(rows, self.optimizer, *batches, self.step_rows)
        return self.workers.gather(found)[0]

    def _export(self, path: Path) -> None:
        parts = {name: parameter.detach() for name, parameter in primary_parameters(self.model).items()}
        weights = collected(parts, self.workers) if self.workers.sharded else None
        if not self.workers.is_first:
            return
        # With the labels in the recipe, an evaluation elsewhere does not need the training data.
        settings, processor = self._with_labels(), self.data.tokenizer
        commit = cached_commit(settings.model_name_or_path, settings.model_revision)
        known = {key: digest for key, digest in self.digests.items() if digest is not None}
        origin: dict[str, Any] = {"step": self.progress.step, "model_commit": commit, "digests": known}
        if stops := self.task.stops(self.model, processor, settings):
            origin["stop_token_ids"] = stops
        if self.task.heads and getattr(processor, "pad_token_id", None) is not None:
            origin[PAD] = self.model.config.get_text_config().pad_token_id
        with atomic_folder(path) as unfinished:
            self.left.write(self.model, unfinished, weights, processor, stops)
            write_recipe(unfinished, settings, origin)
            if settings.chat_template is not None:
                (unfinished / TEMPLATE).write_text(str(processor.chat_template), encoding="utf-8")


def fit(
    config: TrialConfig,
    folder: TrialFolder,
    report: Report,
    workers: Workers = ALONE,
    digests: Mapping[str, str] | None = None,
    keep_base: bool = False,
    tell: Tell = lambda _: None,
) -> Progress:
    """Train one trial, or go on with it, and keep its best adapter in `folder`.

    Args:
        config: the settings; they decide every number that comes out, on one machine.
        folder: where checkpoints and the best adapter go. Holds the trial's earlier checkpoints if it was interrupted.
        report: takes the metrics of each evaluation, in order, `step` among them, and says whether to go on. After an
            interruption the earlier evaluations are told again, since the last one may have been lost with the process.
        workers: the processes that call this together, with equal arguments; each of them reports, and what the first
            one is told decides.
        digests: setting -> digest that what it names must have: this trial is to be compared with others, which had
            those rows and that base. What is not there may be anything.
        keep_base: whether to keep the base model in memory for the next trial of this process.
        tell: hears what is done between evaluations, so that nobody wonders; it decides nothing.

    Returns:
        What was done, with the best value and its step. A trial that was ended by a report has its checkpoint: it can
        be gone on with.

    Raises:
        UserError: a row, a column, the model or a target module is not as the settings say.
        MachineError: the data or the model cannot be read now, or have other `digests`.
        OSError: the folder, or where the system keeps what is temporary, cannot be written; it names a file.
        TrialFailure: the loss became NaN or infinite, or memory ran out.
    """
    run: Run | None = None
    try:
        run = Run(config, folder, workers, digests, keep_base, tell)
        run.resume()
        with _ending(run):
            goes_on = all(workers.gather(report(metrics))[0] is not False for metrics in run.progress.history)
            while goes_on and not run.is_over:
                run.train_step()
                tell(run.moving("training"))
                if run.evaluation_due():
                    tell(run.moving("evaluating"))
                    goes_on = workers.gather(report(run.evaluate()))[0] is not False
        return run.progress
    except OutOfMemory as error:
        failed = OutOfMemory(*error.args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or (run is not None and run.room.cannot_retry and run.room.proven.metrics()):
            raise
        where = "while the model was loaded" if run is None else f"after step {run.progress.step}"
        failed = failure(where, Shortage.of(error), config)
    run = None  # with its memory, for who keeps the error
    raise failed


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """Has the base of `run` back after the block, unless it ended amid a step."""
    try:
        yield
    except (NonFiniteLoss, SystemExit):  # with the latter Tune ends a trial, out of a report
        run.base.end()
        raise
    run.base.end()


def _allowed(changed: Mapping[str, Any]) -> Mapping[str, Any]:
    """`changed`, if another trial's checkpoint can be gone on from so. UserError if not."""
    if other := sorted(changed.keys() - AMID):
        raise UserError(f"{other[0]}: may not change amid a training; allowed: {', '.join(sorted(AMID))}")
    return changed


def share_of(share: float, count: int) -> int:
    """`share` x `count`, rounded up; 1.1 x 10 is 11, although the product of the floats is a little more."""
    return math.ceil(share * count * (1 - 1e-9))


def eval_every(eval_steps: float, max_steps: int) -> int:
    """Steps from one evaluation to the next."""
    return int(eval_steps) if eval_steps >= 1 else share_of(eval_steps, max_steps)
