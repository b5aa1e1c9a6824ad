"""What large data cost: seconds and memory of a dry run and of a short training on a JSONL file made here.

The commands run one by one, each in a process of its own. Its peak is of its resident memory, files that are mapped and
that the system can take back at any moment included, and of what it cannot take back (anonymous memory, polled).

    python benchmarks/large_data.py [--gigabytes 1] [--repeats 3] [--max-train-samples N] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

COMMAND = Path(sys.executable).with_name("bilora-ray")
SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"
WORDS = (
    "a",
    "rain",
    "the",
    "hills",
    "and",
    "then",
    "sun",
    "that",
    "sets",
    "late",
    "on",
    "road",
    "goes",
    "where",
    "ends",
)
POLL_S = 0.02
# Of a training, so that it is short; the rows that it validates on are few.
SHORT = {"max_steps": 4, "eval_steps": 4, "max_eval_samples": 200, "predict_with_generate": False}


def rows(size: int) -> Iterator[str]:
    """Lines of JSON, about a kilobyte each, `size` bytes of them; no two are the same."""
    random, written, number = Random(0), 0, 0
    texts = [" ".join(random.choices(WORDS, k=60)) for _ in range(1000)]
    while written < size:
        first, second = random.choice(texts), random.choice(texts)
        line = f'{{"prompt": "{number}: {first} {second}", "completion": "{second}. #### {number}"}}\n'
        number, written = number + 1, written + len(line)
        yield line


def measured(command: Sequence[str], folder: Path) -> tuple[float, float, float, float]:
    """Of one process: seconds, those of the CPU, peak of the resident memory and of its anonymous part in MiB."""
    started = time.perf_counter()
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
        anonymous = 0
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            anonymous = max(anonymous, _anonymous_kib(process.pid))
            time.sleep(POLL_S)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {(folder / 'output').read_text()}")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10, anonymous / 2**10


def _anonymous_kib(pid: int) -> int:
    found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def commands(data: Path, storage: Path, max_train_samples: int | None) -> dict[str, list[str]]:
    """What is measured, by name."""
    fixed = {"train_data": str(data), "validation_data": "null", "max_length": 128}
    short = SHORT | ({} if max_train_samples is None else {"max_train_samples": max_train_samples})
    short |= {"rank": 8, "auxiliary_rank": 8, "rho": 0.05, "learning_rate": 1e-3, "metric": "eval_loss"}
    space = [f"--space={SPACE}", f"--storage-path={storage}"]
    return {
        "tune --dry-run": [str(COMMAND), "tune", *space, "--dry-run", *_set(fixed)],
        "train": [
            str(COMMAND),
            "train",
            *space,
            *_set(fixed | {key: json.dumps(value) for key, value in short.items()}),
        ],
    }


def _set(settings: dict[str, object]) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-train-samples", type=int)
    parser.add_argument("--only", choices=("tune --dry-run", "train"))
    parser.add_argument("--folder", type=Path, help="where the file is made, and removed")
    arguments = parser.parse_args()
    print("| data | command | time (s) | of the CPU (s) | peak memory (MiB) | of it anonymous (MiB) |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        data = folder / "data.jsonl"
        with data.open("w") as file:
            file.writelines(rows(int(arguments.gigabytes * 1e9)))
        for what, command in commands(data, folder / "runs", arguments.max_train_samples).items():
            if arguments.only not in (None, what):
                continue
            results = []
            for _ in range(arguments.repeats):
                results.append(measured(command, folder))
                shutil.rmtree(folder / "runs", ignore_errors=True)
            figures = " | ".join(f"{statistics.median(values):.0f}" for values in zip(*results, strict=True))
            print(f"| {arguments.gigabytes:g} GB | {what} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
