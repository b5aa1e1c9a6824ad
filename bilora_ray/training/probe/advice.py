"""Which settings would make a trial faster, by estimate: each with what the estimate stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bilora_ray.config import TrialConfig

# Of the memory that is free, the share that a suggestion may want.
SPARE = 0.8
# Less of a gain than this is none.
LEAST = 1.02
MOST = 3
# Steps of compiled blocks beside eager ones: 1.15 to 1.27 x as fast were those of a Llama of 1B, measured on one H200.
# How long they take to compile, once a trial, is an estimate.
COMPILED, COMPILE_SECONDS = 1.2, 120
GIB = 2**30


@dataclass(frozen=True)
class Suggestion:
    """A setting with the value that it could have.

    Attributes:
        setting: with its value, as in a space file.
        value: the same value.
        speedup: the trial's time over what it would take, by estimate.
        reason: what the estimate stands on.
    """

    setting: str
    value: Any
    speedup: float
    reason: str


@dataclass(frozen=True)
class Seen:
    """What a profile has seen of a trial. Seconds and operations are of all of it, bytes of one moment.

    Attributes:
        config: the settings.
        sharded: whether each worker has a part of the model.
        device: its kind.
        seconds: by part.
        passes: forward passes of a step.
        padding: the share of the positions that holds no token.
        operations: that its steps need.
        rate: operations a second that a large product reaches.
        rate_of_bf16: those of one in bf16 on a GPU that has it; None elsewhere, or where the trial is in bf16.
        memory: by kind.
        with_doubled_passes: those of its steps as `doubled` has them; None where that has no room, or no effect.
        kept_if_not_recomputed: bytes that a pass would keep without checkpointing; None where there is none.
        could_flatten: whether torch's kernel could read this model's rows without padding, and another one reads them.
        could_compile: whether this machine could compile the blocks of the model, and they are not.
        rows_to_evaluate: validation rows of a worker.
        evaluations: how many it has.
        evaluations_if_rarer: the same with `rarer` ones; None where there are none.
    """

    config: TrialConfig
    sharded: bool
    device: str
    seconds: Mapping[str, float]
    passes: float
    padding: float
    operations: float
    rate: float
    rate_of_bf16: float | None
    memory: Mapping[str, int]
    with_doubled_passes: float | None
    kept_if_not_recomputed: int | None
    could_flatten: bool
    could_compile: bool
    rows_to_evaluate: int
    evaluations: int
    evaluations_if_rarer: int | None

    def may_have(self, setting: str, value: Any) -> bool:
        """Whether the trial could have a setting with that value, as its workers share it."""
        return not self.sharded or self.config.model_copy(update={setting: value}).whole_only is None

    @property
    def computing(self) -> float:
        """Seconds of forward and backward passes."""
        return self.seconds["forward"] + self.seconds["backward"]

    @property
    def in_steps(self) -> float:
        """Seconds of its steps."""
        return sum(self.seconds[part] for part in ("data", "forward", "backward", "optimizer", "other"))


# What is saved of the trial's seconds, and the rest of a suggestion.
Found = Iterator[tuple[str, Any, float, str]]


def suggestions(seen: Seen) -> tuple[Suggestion, ...]:
    """Those that would gain most, the best first."""
    total = sum(seen.seconds.values())
    found = [
        Suggestion(setting, value, total / (total - saved), reason)
        for look in LOOKS
        for setting, value, saved, reason in look(seen)
        if saved < total and seen.may_have(setting, value)
    ]
    best = sorted(found, key=lambda suggestion: -suggestion.speedup)[:MOST]
    return tuple(suggestion for suggestion in best if suggestion.speedup >= LEAST)


def doubled(config: TrialConfig) -> dict[str, Any]:
    """Settings by which passes may be twice as large, and a step has the same rows; none where no setting does that."""
    if config.tokens_per_pass is not None:
        return {"tokens_per_pass": 2 * config.tokens_per_pass}
    rows, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if passes % 2:
        return {}
    return {"per_device_train_batch_size": 2 * rows, "gradient_accumulation_steps": passes // 2}


def rarer(config: TrialConfig) -> float | None:
    """`eval_steps` with twice as many steps between two evaluations; None where a share cannot be so large."""
    every = config.eval_steps
    if every >= 1:
        return 2 * int(every)
    return 2 * every if every < 0.5 else None


def _precision(seen: Seen) -> Found:
    if seen.rate_of_bf16 is None or seen.config.quantization is not None:
        return
    gain = seen.rate_of_bf16 / seen.rate
    products = min(seen.computing, seen.operations / seen.rate)
    # What is no product moves half the bytes.
    saved = products * (1 - 1 / gain) + (seen.computing - products) / 2
    yield "precision", "bf16", saved, f"large products are {gain:.1f} x as fast here, and all else moves half the bytes"


def _checkpointing(seen: Seen) -> Found:
    kept, free = seen.kept_if_not_recomputed, seen.memory["free"]
    if kept is not None and kept < SPARE * free:
        reason = f"a pass would keep {kept / GIB:.2g} GiB, of {free / GIB:.2g} that are free"
        yield "gradient_checkpointing", False, seen.seconds["forward"], reason


def _larger_passes(seen: Seen) -> Found:
    if seen.with_doubled_passes is None:
        return
    (setting, value), *others = doubled(seen.config).items()
    beside = "".join(f" with {name}: {other}" for name, other in others)
    reason = f"measured; the rows of a step stay the same{beside}"
    yield setting, value, seen.in_steps - seen.with_doubled_passes, reason


def _padding(seen: Seen) -> Found:
    if seen.could_flatten:
        reason = f"{seen.padding:.0%} of the positions are padding"
        yield "attn_implementation", "varlen", seen.padding * seen.computing, reason


def _compiled(seen: Seen) -> Found:
    if seen.could_compile:
        reason = f"a 1B's steps were 1.15 to 1.27 x as fast on an H200; less {COMPILE_SECONDS} s, say, to compile"
        yield "torch_compile", True, seen.in_steps * (1 - 1 / COMPILED) - COMPILE_SECONDS, reason


def _generation(seen: Seen) -> Found:
    size = seen.config.per_device_generation_batch_size
    if size is None or seen.device != "cuda" or size >= seen.rows_to_evaluate:
        return
    batches = -(-seen.rows_to_evaluate // size)
    reason = f"texts are written in {batches} batches, and one takes hardly longer than a small one"
    yield "per_device_generation_batch_size", None, seen.seconds["generation"] * (1 - 1 / batches), reason


def _evaluations(seen: Seen) -> Found:
    before, after = seen.evaluations, seen.evaluations_if_rarer
    if after is None or not 1 < after < before:
        return
    taken = sum(seen.seconds[part] for part in ("evaluation", "generation", "checkpoint"))
    gain = f"{before} evaluations take {taken / sum(seen.seconds.values()):.0%} of the time; {after} would"
    cost = "there a search could stop a trial fewer times, and of fewer checkpoints the best is kept"
    yield "eval_steps", rarer(seen.config), taken * (1 - after / before), f"{gain} take less, but {cost}"


LOOKS: tuple[Callable[[Seen], Found], ...] = (
    _precision,
    _checkpointing,
    _larger_passes,
    _padding,
    _compiled,
    _generation,
    _evaluations,
)
