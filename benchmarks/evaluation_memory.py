"""What an evaluation pass takes at its peak, and how long: logits of targets alone, against those of all positions.

A random model of Llama's shape measures 32 rows with the lengths of GSM8K's, taken as a token for each four bytes, on
one thread. `all` is what transformers computes of a padded batch with its mask, scored at once. Each pass is in a
process of its own, in turns; the peak is that of its resident memory over what it had before the pass, counted anew
when that begins. Both must find the same loss, to the last bit.

    python benchmarks/evaluation_memory.py --data FOLDER [--repeats 3] [--vocabulary 32000]

FOLDER has GSM8K's train.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from array import array
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

ROWS = 32
CODES = ("all", "targets")
DTYPES = ("float32", "bfloat16")
Measured = dict[str, float]


def lengths(data: Path) -> list[tuple[int, int]]:
    """Tokens of the question and of the answer of the first rows."""
    with (data / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, ROWS)]
    return [(len(row["question"].encode()) // 4, len(row["answer"].encode()) // 4) for row in rows]


def peak() -> int:
    """Bytes of main memory that this process has had at the most, since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak() -> None:
    """Begin to count anew: the peak is what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(code: str, dtype: str, data: Path, vocabulary: int) -> Measured:
    """One pass."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from bilora_ray.training.metrics import IGNORED
    from bilora_ray.training.tasks import TASKS
    from bilora_ray.training.tasks.base import Example

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=8, **shape)
    # In its precision from the first: what a larger one has left behind would be used again, and not be seen.
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    random, examples = Random(0), []
    for question, answer in lengths(data):
        ids = random.choices(range(vocabulary), k=question + answer)
        examples.append(Example(array("i", ids), array("i", [IGNORED] * question + ids[question:])))
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    batch, seen = TASKS["causal-lm"].collate(examples, tokenizer), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1].numel()))
    forget_peak()
    before, started = peak(), time.process_time()
    with torch.no_grad():
        if code == "targets":
            loss = TASKS["causal-lm"].measure(*TASKS["causal-lm"].forward(model, batch)).negative_log_likelihood
        else:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            kept = batch["labels"][:, 1:] != IGNORED
            scores, wanted = logits[:, :-1][kept].float(), batch["labels"][:, 1:][kept]
            picked = scores.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
            loss = (scores.logsumexp(-1) - picked).double().sum().item()
    seconds = time.process_time() - started
    return {"peak MiB": (peak() - before) / 2**20, "CPU s": seconds, "rows at the head": sum(seen), "loss": loss}


def main() -> None:
    """Print a line for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        code, dtype = args.one
        print(json.dumps(measure(code, dtype, args.data, args.vocabulary)))
        return
    told = ["--data", str(args.data), "--vocabulary", str(args.vocabulary)]
    print(f"{'':10} {'':17} {'all':>9} {'targets':>9} {'ratio':>7} {'of single pairs':>17}")
    for dtype in DTYPES:
        found: dict[str, list[Measured]] = {code: [] for code in CODES}
        for turn in range(args.repeats):
            for code in CODES if turn % 2 else CODES[::-1]:
                command = [sys.executable, __file__, *told, "--one", code, dtype]
                output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
                found[code].append(json.loads(output.stdout.splitlines()[-1]))
        assert len({one["loss"] for code in CODES for one in found[code]}) == 1, "the losses differ"
        for key in ("peak MiB", "CPU s", "rows at the head"):
            ours, theirs = ([one[key] for one in found[code]] for code in ("targets", "all"))
            ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
            values = f"{statistics.median(theirs):9.4g} {statistics.median(ours):9.4g} {statistics.median(ratios):7.2f}"
            print(f"{dtype:10} {key:17} {values} {ratios[0]:8.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
