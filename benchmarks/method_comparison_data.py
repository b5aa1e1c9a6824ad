"""The files that search_spaces/comparisons/method_comparison.yaml reads: the rows of PEFT's method_comparison.

Training rows are those of MetaMathQA whose query and response have 1,300 characters at the most; validation rows are
50 of GSM8K's training rows, drawn as PEFT's script draws them; test rows are all of GSM8K's test; and 100 articles of
Wikipedia tell what is forgotten. https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA

    python benchmarks/method_comparison_data.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

MOST_CHARACTERS, VALIDATION_ROWS, ARTICLES = 1_300, 50, 100


def training_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Those that are short enough, in their order."""
    kept = ({key: row[key] for key in ("query", "response")} for row in rows)
    return [row for row in kept if len(f"{row['query']} {row['response']}") <= MOST_CHARACTERS]


def as_asked(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of GSM8K under MetaMathQA's names."""
    return [{"query": row["question"], "response": row["answer"]} for row in rows]


def drawn(count: int) -> list[int]:
    """Which of so many rows of GSM8K validate."""
    indices = np.arange(count)
    np.random.RandomState(0).shuffle(indices)
    return [int(index) for index in indices[:VALIDATION_ROWS]]


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(path)


def main(folder: Path) -> None:
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    gsm8k = load_dataset("openai/gsm8k", "main")
    known = as_asked(gsm8k["train"])
    wiki = load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True)
    write(folder / "train.jsonl", training_rows(load_dataset("meta-math/MetaMathQA")["train"]))
    write(folder / "validation.jsonl", [known[index] for index in drawn(len(known))])
    write(folder / "test.jsonl", as_asked(gsm8k["test"]))
    write(folder / "wiki.jsonl", [{"text": row["text"]} for row in islice(wiki, ARTICLES)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
