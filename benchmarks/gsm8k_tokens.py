"""Real tokens a second, and what a step keeps for its backward pass, on the lengths of GSM8K: this code against other.

A small model of Llama's shape learns the answers by the product's own training step, 32 rows a step, on one thread.
Both codes take the same steps on the same rows, in turns, each in a process of its own; a ratio is of one step by both.
Real tokens are those of rows, without padding. What is kept are the bytes of the storages that autograd saves, each
counted once and the weights not, at their peak within a step.

    python benchmarks/gsm8k_tokens.py --data FOLDER --against CHECKOUT [--steps 8] [--now KEY=VALUE ...]

FOLDER has GSM8K's train.jsonl; CHECKOUT is of the revision to compare with, and runs with this Python's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PRECISIONS = ("fp32", "bf16")
ROWS = 32
VOCABULARY = 8192
SETTINGS: dict[str, Any] = {
    "task": "causal-lm",
    "prompt_template": "{question}\n",
    "completion_template": "{answer}",
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": ROWS // 4,
    "eval_steps": 10_000,
}
Measured = dict[str, float]


def make_model(data: Path, folder: Path, hidden: int, layers: int) -> None:
    """A random model, and a byte-level tokenizer that has learned GSM8K's words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    learned = ByteLevelBPETokenizer()
    texts = (text for row in rows for text in (row["question"], row["answer"]))
    learned.train_from_iterator(texts, VOCABULARY, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, pad_token="<pad>", eos_token="</s>")
    shape = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Saved:
    """What autograd keeps, by storage."""

    def __init__(self, weights: Sequence[Any]) -> None:
        self.ours = {weight.untyped_storage().data_ptr() for weight in weights}
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def keep(self, tensor: Any) -> _Kept:
        """Autograd saves `tensor`."""
        return _Kept(tensor, self)

    @staticmethod
    def give(kept: _Kept) -> Any:
        """Autograd wants it back."""
        return kept.tensor


class _Kept:
    def __init__(self, tensor: Any, saved: Saved) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.saved, self.place, self.size = tensor, saved, storage.data_ptr(), storage.nbytes()
        if self.place in saved.ours:
            self.size = 0
        saved.holders[self.place] += 1
        if saved.holders[self.place] == 1:
            saved.bytes += self.size
            saved.peak = max(saved.peak, saved.bytes)

    def __del__(self) -> None:
        self.saved.holders[self.place] -= 1
        if self.saved.holders[self.place] == 0:
            self.saved.bytes -= self.size


def take_steps(settings: dict[str, Any]) -> None:
    """A step for each line that comes in; its measures go out. A line that says `saved` has its bytes counted."""
    import torch

    torch.set_num_threads(1)
    import bilora_ray
    from bilora_ray.config import TrialConfig
    from bilora_ray.training.folder import TrialFolder
    from bilora_ray.training.loop import Run

    assert Path(bilora_ray.__file__).is_relative_to(Path.cwd())  # the code that is asked for
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        run = Run(TrialConfig(**settings), TrialFolder(Path(folder)))
        positions = Counter[str]()
        run.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, inputs: positions.update(read=inputs[0].numel())
        )
        print(json.dumps({"rows": run.step_rows}), file=answers, flush=True)
        for line in sys.stdin:
            saved = Saved([*run.model.parameters(), *run.model.buffers()])
            positions.clear()
            before = run.window.tokens
            wall, cpu = time.perf_counter(), time.process_time()
            if line.strip() == "saved":
                with torch.autograd.graph.saved_tensors_hooks(saved.keep, saved.give):
                    run.train_step()
            else:
                run.train_step()
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            found = {"tokens": run.window.tokens - before, "positions": positions["read"], "saved": saved.peak}
            print(json.dumps({**spent, **found}), file=answers, flush=True)


def contender(code: Path, settings: dict[str, Any]) -> Callable[[str], Measured]:
    """A process that takes steps with `code`: what it is told -> what it measured."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(code)}
    command = [sys.executable, str(HERE), "--step", json.dumps(settings)]
    process = subprocess.Popen(
        command,
        cwd=code,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told, answers = process.stdin, process.stdout

    def answer() -> Measured:
        line = answers.readline()
        if not line:
            raise SystemExit(f"{code}: a step failed; run {' '.join(command[:2])} --step '{command[3]}' there")
        measured: Measured = json.loads(line)
        return measured

    assert answer()["rows"] == ROWS

    def step(how: str) -> Measured:
        print(how, file=told, flush=True)
        return answer()

    return step


def measure(
    codes: dict[str, Path], settings: dict[str, Any], now: dict[str, Any], steps: int, warmup: int
) -> dict[str, list[Measured]]:
    """What each code measured in each step: the last one has its saved bytes counted, and its time is not told."""
    takers = {name: contender(code, {**settings, **(now if name == "now" else {})}) for name, code in codes.items()}
    found: dict[str, list[Measured]] = {name: [] for name in codes}
    for step in range(warmup + steps + 1):
        for name in list(takers) if step % 2 else reversed(list(takers)):
            measured = takers[name]("saved" if step == warmup + steps else "timed")
            if step >= warmup:
                found[name].append(measured)
    return found


def lines(precision: str, found: dict[str, list[Measured]]) -> list[str]:
    """The table's lines of one precision."""
    rows = []
    for name, measured in found.items():
        timed = measured[:-1]
        speed = [statistics.median(step["tokens"] / step[clock] for step in timed) for clock in ("cpu", "wall")]
        padding = sum(step["positions"] for step in timed) / sum(step["tokens"] for step in timed)
        saved = measured[-1]["saved"] / 2**20
        rows.append(f"| {precision} | {name} | {speed[0]:.0f} | {speed[1]:.0f} | {padding:.3f} | {saved:.1f} |")
    before, now = found["before"], found["now"]
    assert [step["tokens"] for step in before] == [step["tokens"] for step in now]  # the same rows
    cells = []
    for clock in ("cpu", "wall"):
        ratios = [old[clock] / new[clock] for old, new in zip(before[:-1], now[:-1], strict=True)]
        cells.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
    saved = now[-1]["saved"] / before[-1]["saved"]
    rows.append(f"| {precision} | now / before | {' | '.join(cells)} | | **{saved:.2f}** |")
    return rows


def main() -> None:
    """Print a table, or take steps for the process that does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--against", type=Path, help="checkout of the code to compare with")
    parser.add_argument("--steps", type=int, default=8, help="timed steps with an fp32 base; a quarter with bf16")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--method", default="bilora")
    parser.add_argument("--now", nargs="*", default=[], metavar="KEY=VALUE", help="settings that only this code has")
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        take_steps(arguments.step)
        return
    if arguments.data is None or arguments.against is None:
        parser.error("--data and --against are needed")
    codes = {"before": arguments.against.resolve(), "now": HERE.parents[1]}
    now = dict(pair.split("=", 1) for pair in arguments.now)
    print("| base | code | real tokens/s, CPU time | real tokens/s, wall | positions / real token | saved, MiB |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_model(arguments.data, Path(folder), arguments.hidden, arguments.layers)
        settings = {**SETTINGS, "method": arguments.method, "model_name_or_path": folder}
        settings["train_data"] = str((arguments.data / "train.jsonl").resolve())
        for precision in PRECISIONS:
            steps = arguments.steps if precision == "fp32" else max(1, arguments.steps // 4)
            total = steps + arguments.warmup + 1
            own = {**settings, "precision": precision, "max_train_samples": ROWS * total, "max_eval_samples": ROWS}
            found = measure(codes, {**own, "max_steps": total}, now, steps, arguments.warmup)
            print("\n".join(lines(precision, found)), flush=True)


if __name__ == "__main__":
    main()
