"""Word problems of the quickstart: a pre-training corpus in plain wording, and a task in ship's-log wording.

Both wordings ask for one addition, subtraction or multiplication of small whole numbers and are answered
the same way, ``" 7 + 5 = 12 #### 12"``. A plain story asks how many there are at the end. The ship's log uses
other words, always mentions one number that plays no part, and tells how many there are at the end to ask how
many there were before, so the habit of adding what was gained gives a wrong answer.

Only ``random.Random.random()`` supplies randomness: it is the one method whose values Python promises to
keep for a seed across versions, so the files have the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from bilora_ray.builtin import quickstart_words as words

T = TypeVar("T")
Row = dict[str, str]
Problem = tuple[str, int, int]

SEED = 20
MAX_RESULT = 40
SPLIT_SIZES = {"train": 240, "validation": 200, "test": 400}
PRETRAINING_ROWS = 80_000


def _pick(rng: Random, choices: Sequence[T]) -> T:
    """Return one element of ``choices``, each equally likely."""
    return choices[int(rng.random() * len(choices))]


def _shuffled(rng: Random, values: Sequence[T]) -> list[T]:
    """Return the elements of ``values`` in random order."""
    keyed = sorted(((rng.random(), index), value) for index, value in enumerate(values))
    return [value for _, value in keyed]


def _problems() -> dict[str, list[Problem]]:
    """Return every (operator, a, b), by operator: operands from 2, and results from 1 to ``MAX_RESULT``."""
    numbers = range(2, MAX_RESULT + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    return {
        "+": [("+", a, b) for a, b in pairs if a + b <= MAX_RESULT],
        "-": [("-", a, b) for a, b in pairs if a > b],
        "*": [("*", a, b) for a, b in pairs if max(a, b) <= 12 and a * b <= MAX_RESULT],
    }


def _completion(problem: Problem) -> str:
    """Return the worked answer of a problem, ending with ``#### <result>``."""
    op, a, b = problem
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return f" {a} {op} {b} = {result} #### {result}"


def _row(text: str, problem: Problem) -> Row:
    """Return the prompt/completion row that asks ``text`` and answers ``problem``."""
    return {"prompt": f"Question: {text}\nAnswer:", "completion": _completion(problem)}


def _made_up_word(rng: Random) -> str:
    """Return a word of two syllables, such as ``"kemli"``."""
    return _pick(rng, words.SYLLABLES) + _pick(rng, words.SYLLABLES)


def _sentence(text: str) -> str:
    """Return ``text`` with a capital first letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def _plain_story(rng: Random, op: str) -> str:
    """Return a form of the plain story for ``op``, which still has its fields in braces."""
    if op == "*":
        return _pick(rng, words.PLAIN_GROUP_FORMS)
    parts = (words.PLAIN_LINKS, words.PLAIN_STOCKS, words.PLAIN_CHANGES)
    link, stock, change = (_pick(rng, part) for part in parts)
    return link.replace("{A}", stock).replace("{B}", change).replace("{v}", _pick(rng, words.PLAIN_VERBS[op]))


def plain_row(rng: Random, problem: Problem) -> Row:
    """Return one row that asks ``problem`` in the wording of the pre-training corpus."""
    op, a, b = problem
    n, m = _shuffled(rng, words.PLAIN_NAMES + words.LOG_NAMES)[:2]
    item = _pick(rng, words.PLAIN_ITEMS + words.LOG_ITEMS)
    if rng.random() < 0.3:
        n = _made_up_word(rng).capitalize()
    if rng.random() < 0.3:
        item = _made_up_word(rng) + "s"
    text = _plain_story(rng, op)
    if rng.random() < 0.7:
        text = _pick(rng, (", ", ". ", " and ")).join(_shuffled(rng, [_pick(rng, words.PLAIN_ASIDES), text]))
    place, aside = _pick(rng, words.PLAIN_PLACES), 2 + int(rng.random() * 29)
    values = {"n": n, "m": m, "i": item, "p": place, "a": a, "b": b, "d": aside}
    question = _pick(rng, words.PLAIN_QUESTIONS)
    return _row(f"{_sentence(text.format(**values))} {question.format(i=item)}", problem)


def sum_row(rng: Random, problem: Problem) -> Row:
    """Return one row that asks ``problem`` as a bare sum, such as ``"7 + 5"``, of a made-up thing."""
    op, a, b = problem
    return _row(f"{a} {op} {b} {_made_up_word(rng)}", problem)


def _corpus_row(rng: Random, problem: Problem) -> Row:
    """Return a bare sum three times in ten, which are short and teach the sums, and else a plain story."""
    return (sum_row if rng.random() < 0.3 else plain_row)(rng, problem)


def log_row(rng: Random, problem: Problem) -> Row:
    """Return one row that asks ``problem`` in ship's-log wording, with one number that plays no part."""
    op, a, b = problem
    item = _pick(rng, words.LOG_ITEMS)
    question = _pick(rng, words.LOG_QUESTIONS).format(i=item)
    if op == "*":
        story, question = _pick(rng, words.LOG_GROUP_FORMS), question.replace(" afore", "")
    else:
        story = _pick(rng, words.LOG_CHANGE_FORMS).replace("{v}", _pick(rng, words.LOG_VERBS[op]))
    text = ", ".join(_shuffled(rng, [_pick(rng, words.LOG_ASIDES), story]))
    values = {"n": _pick(rng, words.LOG_NAMES), "i": item, "a": a, "b": b, "d": 2 + int(rng.random() * 29)}
    return _row(f"{_sentence(text.format(**values))} {question}", problem)


def _distinct_rows(
    rng: Random, make: Callable[[Random, Problem], Row], problems: dict[str, list[Problem]], count: int
) -> list[Row]:
    """Return ``count`` rows with distinct prompts: two in five add, two in five subtract, one multiplies."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = make(rng, _pick(rng, problems[_pick(rng, "++--*")]))
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def pretraining_rows(count: int = PRETRAINING_ROWS, seed: int = SEED) -> list[Row]:
    """Return ``count`` rows of the pre-training corpus: stories in plain wording and bare sums."""
    return _distinct_rows(Random(f"corpus {seed}"), _corpus_row, _problems(), count)


def plain_rows(count: int, seed: int = SEED) -> list[Row]:
    """Return ``count`` stories in plain wording, drawn apart from the pre-training corpus."""
    return _distinct_rows(Random(f"plain {seed}"), plain_row, _problems(), count)


def task_splits(seed: int = SEED) -> dict[str, list[Row]]:
    """Return the ship's-log rows by split; no (operator, a, b) occurs in two splits."""
    rng = Random(f"log {seed}")
    shares: dict[str, dict[str, list[Problem]]] = {name: {} for name in SPLIT_SIZES}
    for op, problems in _problems().items():
        rest = _shuffled(rng, problems)
        for name, size in SPLIT_SIZES.items():
            cut = len(problems) * size // sum(SPLIT_SIZES.values())
            shares[name][op], rest = rest[:cut], rest[cut:]
    return {name: _distinct_rows(rng, log_row, shares[name], size) for name, size in SPLIT_SIZES.items()}


def chats(rows: list[Row]) -> list[dict[str, list[dict[str, str]]]]:
    """Return conversations of two questions and their answers each, as OpenAI's files have them."""
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"].strip()}]
        for row in rows
    ]
    return [{"messages": first + second} for first, second in zip(turns[::2], turns[1::2], strict=True)]


def write_splits(folder: Path, seed: int = SEED) -> list[Path]:
    """Write ``<split>.jsonl`` for every split, and ``chats.jsonl`` of the training rows, into ``folder``.

    Return the paths. There is one JSON row per line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Any]] = {**task_splits(seed)}
    splits["chats"] = chats(splits["train"])
    paths = []
    for name, rows in splits.items():
        path = folder / f"{name}.jsonl"
        path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))
        paths.append(path)
    return paths
