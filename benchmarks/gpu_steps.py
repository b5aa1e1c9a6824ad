"""One training step on a GPU, in the shapes that people train: `step_time.py --device cuda`.

The contenders of a shape share one frozen base of random weights in bf16, built on the device, and take turns, in an
order that is reversed every round. Adapters have rank 8 on all linear layers; every token is learned; no row is padded.

- `peft-autocast`: PEFT as it is on the bf16 base, adapters in fp32, `torch.autocast` in bf16, fused AdamW and the norm
  limit of 1, which is what HF Trainer does with `bf16=True`; an attention mask in the batch, as its collator has it.
- `lora`, `bilora`, and other methods: the product's own path, from the task's batch to the method's optimizer.
- `...+compile`: with the blocks compiled, or `(eager)` where some could not be; `...+checkpointing`: with activations
  recomputed.

A time is a step's, by events of the GPU: from an idle device to the last kernel, of so many steps in a row as take a
tenth of a second. MFU is the step's operations in products and attention, as plain LoRA's own pass has them, over what
a large bf16 product reaches on the same card. The peak is the base, the contender's own state and its step.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from bilora_ray.facts import ADAPTING
from bilora_ray.method import build_method, settings_of
from bilora_ray.training import model as models
from bilora_ray.training.compute.compiled import Compiled, why_not
from bilora_ray.training.distributed.parallel import Network
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.probe.roofline import Marks, matmul_rate, operations, wait
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, on_device

TASK = TASKS["causal-lm"]
OURS, STOCK, RECOMPUTED = "ours", "peft-autocast", "bilora+checkpointing"
LIMIT = 1.0
# Seconds that a turn takes at least, by steps in a row, and those of all turns of a shape and a length.
TURN, ALL_TURNS = 0.1, 5.0
FEWEST = 4


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    # Qwen2.5-0.5B, Llama-3.2-1B, Llama-3.1-8B.
    "0.5b": lambda: Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "1b": lambda: _llama(2048, 8192, 16, 32, tied=True),
    "8b": lambda: _llama(4096, 14336, 32, 32, tied=False),
    # To see that all of this runs.
    "tiny": lambda: LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}


# The batches of both kinds of steps, by whose they are.
Batches = dict[str, dict[str, Tensor]]
Step = Callable[[Batches, Marks], None]


@dataclass
class Contender:
    """What takes a turn: steps on its own adapters."""

    name: str
    step: Step
    compiled: Compiled
    state: int = 0
    peak: int = 0
    phases: list[dict[str, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name, and that blocks computed as they are, where they were to be compiled."""
        return self.name + (" (eager)" if self.compiled.metrics().get("compiled") == 0 else "")

    @property
    def times(self) -> list[float]:
        """Milliseconds a step, by round."""
        return [sum(phases.values()) for phases in self.phases]


@dataclass
class Row:
    """A contender's figures at one shape and length: times in milliseconds, memory in GiB.

    `ratio` is the median over the rounds of its time over the stock contender's; None without that.
    """

    shape: str
    tokens: str
    contender: str
    median: float
    fastest: float
    slowest: float
    ratio: float | None
    phases: dict[str, float]
    tokens_per_second: float
    mfu: float
    peak: float

    def cells(self) -> list[str]:
        """As in the table."""
        parts = " / ".join(f"{self.phases.get(name, 0.0):.1f}" for name in ("forward", "backward", "optimizer"))
        return [
            self.shape,
            self.tokens,
            self.contender,
            f"{self.median:.1f}",
            f"{self.fastest:.1f} to {self.slowest:.1f}",
            "" if self.ratio is None else f"{self.ratio:.3f}",
            parts,
            f"{self.tokens_per_second:,.0f}",
            f"{self.mfu:.0%}",
            f"{self.peak:.1f}",
        ]


HEAD = (
    "shape",
    "tokens",
    "contender",
    "ms a step, median",
    "fastest to slowest",
    f"/ {STOCK}",
    "forward / backward / optimizer, ms",
    "tokens/s",
    "MFU",
    "peak, GiB",
)


def build_base(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen base of random weights, on `device` from the first."""
    with device:
        base = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    base.config.pad_token_id = 0
    return base.requires_grad_(False)


def beside(base: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the very weights of `base`."""
    tensors = (*base.parameters(), *base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def batches(rows: int, length: int, vocabulary: int, device: torch.device) -> Batches:
    """Random rows, as the product and as HF Trainer's collator have them."""
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    examples = [Example(array("i", row), array("i", row)) for row in ids.tolist()]
    ours = TASK.collate(examples, SimpleNamespace(pad_token_id=0))
    stock = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    place = SimpleNamespace(device=device)
    return {OURS: on_device(ours, place), STOCK: on_device(stock, place)}


def contender(name: str, base: PreTrainedModel, settings: dict[str, Any]) -> Contender:
    """The contender `name`, with optional parts behind plus signs, on adapters of its own over `base`."""
    method, *extras = name.split("+")
    torch.manual_seed(0)
    rank = settings["auxiliary_rank"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(beside(base), lora)
    make = _stock_step if method == STOCK else partial(_own_step, method)
    step = make(model, settings)
    model.train()
    if "checkpointing" in extras:
        models.enable_gradient_checkpointing(model)
    compiled = Compiled(model, model.device, wanted="compile" in extras)
    return Contender(name, compiled.at_work()(step), compiled)


def _stock_step(model: PeftModel, settings: dict[str, Any]) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0, fused=True)

    def step(data: Batches, marks: Marks) -> None:
        optimizer.zero_grad()
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = model(**data[STOCK]).loss
        marks.mark("forward")
        loss.backward()
        marks.mark("backward")
        torch.nn.utils.clip_grad_norm_(trained, LIMIT)
        optimizer.step()
        marks.mark("optimizer")

    return step


def _own_step(method: str, model: PeftModel, settings: dict[str, Any]) -> Step:
    optimizer = build_method(method, model, **{key: settings[key] for key in settings_of(method)})
    network = Network(model, ALONE)

    def step(data: Batches, marks: Marks) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = TASK.loss(network, data[OURS])
            marks.mark("forward")
            loss.backward()
            marks.mark("backward")
            return loss

        optimizer.step(closure)
        marks.mark("optimizer")

    return step


class Race:
    """Contenders over one base.

    Args:
        shape: of the base.
        names: of those that run at each length.
        device: where.
        settings: of the methods.
        dtype: of the base.
    """

    def __init__(
        self,
        shape: str,
        names: Sequence[str],
        device: torch.device,
        settings: dict[str, Any],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.base = build_base(shape, device, dtype)
        self.marks = Marks(device)
        self.contenders: list[Contender] = []
        for name in names:
            before = _allocated(device)
            self.contenders.append(contender(name, self.base, settings))
            self.contenders[-1].state = _allocated(device) - before

    def run(self, rows: int, length: int, names: Iterable[str]) -> list[Contender]:
        """Those of `names` that have taken their turns; one that does not fit is left out, and that is said."""
        data = batches(rows, length, self.base.config.vocab_size, self.marks.device)
        found, seconds = [], {}
        for each in self.contenders:
            if each.name not in names:
                continue
            each.phases, each.peak = [], 0
            before = _allocated(self.marks.device)
            try:
                seconds[each.name] = warmed_up(each, data, self.marks)
            except torch.OutOfMemoryError:
                print(f"{each.name} at {rows} x {length}: out of memory", flush=True)
                self.marks.found.clear()
                _empty(self.marks.device)
                continue
            _empty(self.marks.device)
            each.state += _allocated(self.marks.device) - before
            found.append(each)
        repeats = {each.name: max(1, min(16, round(TURN / seconds[each.name]))) for each in found}
        a_round = sum(seconds[name] * repeats[name] for name in repeats)
        for round_ in range(max(FEWEST, min(8, round(ALL_TURNS / max(a_round, 1e-3))))):
            for each in found if round_ % 2 == 0 else reversed(found):
                self._turn(each, data, repeats[each.name])
        return found

    def operations(self, length: int) -> int:
        """Those of a row of such a length in a step of plain LoRA, or else of the first contender."""
        data = batches(1, length, self.base.config.vocab_size, self.marks.device)
        plain = next((each for each in self.contenders if each.name == "lora"), self.contenders[0])
        return operations(lambda: plain.step(data, self.marks))

    def _turn(self, each: Contender, data: Batches, repeats: int) -> None:
        """So many steps in a row, from an idle device on."""
        device = self.marks.device
        self.marks.found.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wait(device)
        self.marks.mark("start")
        for _ in range(repeats):
            each.step(data, self.marks)
        wait(device)
        each.phases.append({name: 1e3 * value / repeats for name, value in self.marks.seconds().items()})
        if device.type == "cuda":
            others = sum(other.state for other in self.contenders if other is not each)
            each.peak = max(each.peak, torch.cuda.max_memory_allocated(device) - others)


def warmed_up(each: Contender, data: Batches, marks: Marks) -> float:
    """Seconds of a step, after two to warm up."""
    for _ in range(3):
        wait(marks.device)
        started = time.perf_counter()
        each.step(data, marks)
        wait(marks.device)
    marks.found.clear()
    return time.perf_counter() - started


def rows_of(race: Race, shape: str, rows: int, length: int, names: Iterable[str], rate: float) -> Iterator[Row]:
    """The rows of the table of one shape at one length. `rate`: operations a second that the device can do."""
    found = race.run(rows, length, names)
    needed, tokens = rows * race.operations(length), rows * length
    stock = next((each.times for each in found if each.name == STOCK), None)
    for each in found:
        times = each.times
        middle = statistics.median(times)
        yield Row(
            shape,
            f"{rows} x {length}",
            each.label,
            middle,
            min(times),
            max(times),
            stock and statistics.median([a / b for a, b in zip(times, stock, strict=True)]),
            {key: statistics.median([phases[key] for phases in each.phases]) for key in each.phases[0]},
            1e3 * tokens / middle,
            1e3 * needed / middle / rate,
            each.peak / 2**30,
        )


def precisions(device: torch.device, settings: dict[str, Any], shape: str, rows: int, length: int) -> Iterator[str]:
    """A table of `bilora` at one shape in fp32, with TF32 products, and in bf16."""
    yield from ("| shape | tokens | precision | ms a step, median | speed / fp32 | peak, GiB |", "| --- " * 6 + "|")
    first = None
    for label, dtype, products in (
        ("fp32", torch.float32, "highest"),
        ("fp32, TF32 products", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(products)
        found = Race(shape, ["bilora"], device, settings, dtype).run(rows, length, ["bilora"])
        torch.set_float32_matmul_precision(before)
        _empty(device)
        cells = "out of memory | |"
        if found:
            middle = statistics.median(found[0].times)
            first = first or middle
            cells = f"{middle:.1f} | {first / middle:.2f} | {found[0].peak / 2**30:.1f}"
        yield f"| {shape} | {rows} x {length} | {label} | {cells} |"


def main(arguments: Any, device: torch.device, settings: dict[str, Any], machine: str) -> None:
    """Measure, print row by row, and write what there is to `arguments.output` as it comes."""
    started = time.perf_counter()
    rate = matmul_rate(device, torch.bfloat16)
    lines: list[str] = []

    def tell(*more: str) -> None:
        lines.extend(more)
        print(*more, sep="\n", flush=True)
        if arguments.output is not None:
            Path(arguments.output).write_text(
                "\n".join(["# A training step on a GPU", "", *lines, ""]), encoding="utf-8"
            )

    tell(f"{machine}; a large bf16 product: {rate / 1e12:,.1f} TFLOP/s. What is what: `benchmarks/gpu_steps.py`.", "")
    tell(f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|")
    for shape in arguments.shapes.split(","):
        names = [name for name in arguments.contenders.split(",") if name.split("+")[0] in (*ADAPTING, STOCK)]
        if shape in arguments.compile.split(","):
            if (problem := why_not(device.type)) is None:
                names.append("bilora+compile")
            else:
                print(f"nothing is compiled here: {problem}", flush=True)
        race = Race(shape, [*names, *([RECOMPUTED] if shape == "8b" else [])], device, settings)
        for at, (rows, length) in enumerate(map(_sizes, arguments.tokens.split(","))):
            running = [*names, *([RECOMPUTED] if at == 0 else [])]
            for row in rows_of(race, shape, rows, length, running, rate):
                tell(f"| {' | '.join(row.cells())} |")
        del race
        _empty(device)
    if arguments.precisions:
        shape, sizes = arguments.precisions.split(":")
        tell("")
        for line in precisions(device, settings, shape, *_sizes(sizes)):
            tell(line)
    tell("", f"{time.perf_counter() - started:.0f} s in all.")


def _sizes(text: str) -> tuple[int, int]:
    rows, length = map(int, text.split("x"))
    return rows, length


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
