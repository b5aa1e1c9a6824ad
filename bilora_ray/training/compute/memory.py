"""What is done where memory runs out: the same work in smaller passes, and the size that had room is remembered.

That is where torch is refused memory, on a GPU or on a CPU. A process that the system kills goes on from its checkpoint
as any other.
"""

from __future__ import annotations

import gc
import json
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory
from bilora_ray.files import unfinished_beside
from bilora_ray.measures import CUDA_GIB, TASK_FACTS
from bilora_ray.training.compute.cutting import Kind, Proven
from bilora_ray.training.distributed.workers import Workers

R = TypeVar("R")

# As torch, a CUDA library and the C++ below them say it, where it is no OutOfMemoryError.
REFUSED = re.compile(r"DefaultCPUAllocator|(can't allocate|not enough|out of) memory|_ALLOC_FAILED|bad_alloc")
AMOUNT = r"([\d.]+) ?(bytes|[KMGT]iB)"
NEEDED = re.compile(rf"(?:tried to allocate|Unable to allocate) {AMOUNT}", re.IGNORECASE)
OF_A_GPU = re.compile(rf"capacity of {AMOUNT} of which {AMOUNT} is free")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# What decides how much room a pass of some positions needs.
DECISIVE = (
    *("model_name_or_path", "model_revision", "task", "precision", "quantization", "attn_implementation"),
    *("max_length", "max_new_tokens", "method", "primary", "rank", "auxiliary_rank", "target_modules", "lora_dropout"),
    *("gradient_checkpointing", "torch_compile"),
)

# The smallest of each kind.
ONE_ROW: dict[Kind, str] = {
    "training": "in a training pass of one row",
    "evaluation": "in an evaluation pass of one row",
    "generation": "while one text was generated",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory for what was to be done."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(REFUSED.search(str(error)))


def release() -> None:
    """Free what nobody holds any more. Cycles first: a GPU's memory is free once the tensors in it are."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_to_share(gpus: float) -> float:
    """Let a trial that has a part of a GPU run out of memory at its own part, and not at that of its neighbours.

    Args:
        gpus: how many a trial has.

    Returns:
        The share of a GPU's memory that torch may have from now on.
    """
    if not 0 < gpus < 1 or not torch.cuda.is_available():
        return 1.0
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    share = max(gpus - CUDA_GIB / total_gib, 0.01)
    torch.cuda.set_per_process_memory_fraction(share)
    return share


@dataclass(frozen=True)
class Shortage:
    """How much memory was missing, in bytes; None where that is not known.

    Attributes:
        needed: what was asked for at last.
        free: what there was then, or is now.
        total: of the device, or of what this process may have of it.
    """

    needed: int | None
    free: int | None
    total: int | None

    @classmethod
    def of(cls, error: BaseException) -> Shortage:
        """What `error` says, and the system. Nothing of `error` is kept: its traceback holds the tensors of a pass."""
        text = str(error)
        needed, on_gpu = NEEDED.search(text), OF_A_GPU.search(text)
        free, total = _room() if on_gpu is None else (_bytes(on_gpu[3], on_gpu[4]), _bytes(on_gpu[1], on_gpu[2]))
        return cls(None if needed is None else _bytes(needed[1], needed[2]), free, total)

    def __str__(self) -> str:
        asked = "" if self.needed is None else f"{_gib(self.needed)} more were needed, "
        return f"{asked}{_gib(self.free)} of {_gib(self.total)} were free"


def failure(where: str, shortage: Shortage, config: TrialConfig) -> OutOfMemory:
    """The end of a trial: in one line where there was no room, the numbers, and what would help."""
    trains = where == ONE_ROW["training"]
    helps = [
        *(["gradient_checkpointing: true"] if trains and not config.gradient_checkpointing else []),
        *(["quantization: nf4"] if config.quantization is None else []),
        *(["precision: bf16"] if config.precision == "fp32" else []),
        *(["a smaller max_length"] if not TASK_FACTS[config.task].reads_images else []),
    ]
    would = f"; {', '.join(helps[:-1])}{' or ' if helps[:-1] else ''}{helps[-1]} would help" if helps else ""
    return OutOfMemory(f"out of memory {where}: {shortage}{would}")


class Room:
    """What a trial knows of the passes that have room, and its study with it.

    Args:
        config: the settings.
        workers: who train the trial.
        file: where the trials of a study keep it; None: nowhere.

    Attributes:
        proven: see `Proven`.
    """

    def __init__(self, config: TrialConfig, workers: Workers, file: Path | None = None) -> None:
        self.config = config
        self.workers = workers
        self.file = file
        self.proven = Proven(**_read(file).get(self._key, {}))

    def learn(self, kind: Kind, size: int) -> None:
        """From now on no pass of this `kind` is larger than `size`."""
        setattr(self.proven, kind, max(size, 1))
        self._write()

    def agree(self) -> None:
        """Let all workers know what each has learned. All call it."""
        self.proven = Proven.least(self.workers.gather(self.proven))

    @property
    def cannot_retry(self) -> bool:
        """Whether a pass is one of all workers, the others of which wait for this one in its midst."""
        return self.workers.sharded and self.workers.world_size > 1

    @property
    def _key(self) -> str:
        """Trials with the same one have passes of like shape, on like devices."""
        settings = self.config.model_dump(mode="json", include=set(DECISIVE))
        place: list[Any] = ["cpu"]
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
            place = [gpu.name, gpu.total_memory >> 30, round(torch.cuda.get_per_process_memory_fraction(), 2)]
        workers = [self.workers.planned, self.workers.sharded, self.workers.world_size]
        return sha256(json.dumps([settings, place, workers], sort_keys=True).encode()).hexdigest()[:16]

    def _write(self) -> None:
        if self.file is None:
            return
        known = {**_read(self.file), self._key: {k: size for k, size in vars(self.proven).items() if size is not None}}
        unfinished = unfinished_beside(self.file)
        with suppress(OSError):  # it spares others a try, and no more
            unfinished.write_text(json.dumps(known), encoding="utf-8")
            unfinished.replace(self.file)


_current: ContextVar[Room | None] = ContextVar("room", default=None)


@contextmanager
def in_room(room: Room) -> Iterator[None]:
    """In the block, what asks for the `current_room` gets this one."""
    token = _current.set(room)
    try:
        yield
    finally:
        _current.reset(token)


def current_room(config: TrialConfig, workers: Workers) -> Room:
    """The one that is in use, or one that knows nothing."""
    return _current.get() or Room(config, workers)


def in_parts(
    room: Room, kind: Kind, compute: Callable[[Sequence[int]], list[R]], size: Callable[[Sequence[int]], int]
) -> Callable[[Sequence[int]], list[R]]:
    """`compute`, which gives a list for the rows of a batch, so that it takes halves of a batch that has no room.

    Args:
        room: what is known, and what is learned.
        kind: of the passes.
        compute: rows -> results, which are joined.
        size: of a batch, in what passes of the `kind` are measured in.

    Raises:
        OutOfMemory: there is no room for one row, nor after what nobody holds was freed.
    """

    def computed(rows: Sequence[int], is_last: bool = False) -> list[R]:
        known = getattr(room.proven, kind)
        if len(rows) == 1 or known is None or size(rows) <= known:
            try:
                return compute(rows)
            except (RuntimeError, MemoryError) as error:
                shortage = smaller(room, kind, len(rows), size(rows), error)
            release()
            if shortage is not None:
                if is_last or room.cannot_retry:
                    raise failure(ONE_ROW[kind], shortage, room.config)
                return computed(rows, is_last=True)
        half = -(-len(rows) // 2)
        return [*computed(rows[:half]), *computed(rows[half:])]

    return computed


def smaller(room: Room, kind: Kind, rows: int, size: int, error: Exception) -> Shortage | None:
    """Take in that a pass of so many `rows` ended with `error`. What was missing, if it had one row: else None.

    Raises:
        Exception: `error` is no lack of memory, or ends the process all the same: another one then goes on from the
            checkpoint.
    """
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        return Shortage.of(error)
    room.learn(kind, size // 2)
    if room.cannot_retry:
        raise error
    return None


def _read(file: Path | None) -> dict[str, Any]:
    """What is in `file`; nothing if it is not as it should be."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        return {key: vars(Proven(**{kind: int(n) for kind, n in sizes.items()})) for key, sizes in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def free_bytes() -> int | None:
    """What is free where a trial computes; None where that is not known."""
    return _room()[0]


def _room() -> tuple[int | None, int | None]:
    """Bytes that are free and that there are, where a trial computes: for this process, if it may not have all."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free, total
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = known["MemAvailable"], known["MemTotal"]
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if 0 <= limit < total:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            free, total = min(free, max(limit - used, 0)), limit
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    return free, total


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])


def _gib(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 2**30:.2f} GiB"
