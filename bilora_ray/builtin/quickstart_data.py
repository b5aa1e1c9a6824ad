"""Word problems of the quickstart: a pre-training corpus in plain wording, and a task in ship's-log wording.

Both wordings ask for one addition, subtraction or multiplication of small whole numbers and are answered
the same way, ``" 7 + 5 = 12 #### 12"``. The ship's log uses other words, may name the operands in the other
order, lets the verb alone decide between gain and loss, and always mentions one number that plays no part.

Only ``random.Random.random()`` supplies randomness: it is the one method whose values Python promises to
keep for a seed across versions, so the files have the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")
Row = dict[str, str]
Problem = tuple[str, int, int]

SEED = 20
MAX_RESULT = 50
SPLIT_SIZES = {"train": 320, "validation": 200, "test": 400}
PRETRAINING_ROWS = 80_000


def _words(text: str) -> list[str]:
    """Return the words of ``text``; an underscore stands for a space inside one."""
    return [word.replace("_", " ") for word in text.split()]


PLAIN_NAMES = _words(
    "Anna Ben Clara David Emma Finn Grace Henry Iris Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina Will"
)
PLAIN_ITEMS = _words(
    "apples books cards coins cups eggs flowers keys marbles pears pencils plums shells stamps stones toys"
)
PLAIN_VERBS = {
    "+": _words("buys earns finds gets makes picks wins"),
    "-": _words("breaks drops eats loses sells spends wastes"),
}
PLAIN_CHANGE_FORMS = (
    "{n} has {a} {i}. Then {n} {v} {b}.",
    "There are {a} {i} in the box and {n} {v} {b}.",
    "{n} {v} {b} {i}. Before that, {n} had {a}.",
    "After {n} {v} {b} of the {i}, {m} counts them. There were {a} at first.",
    "{n} {v} {b} {i} with {a} in the box.",
)
PLAIN_GROUP_FORMS = (
    "There are {a} boxes with {b} {i} each.",
    "{n} packs {b} {i} into each of {a} bags.",
    "{a} friends of {n} have {b} {i} each.",
    "Each of the bags has {b} {i}. There are {a} bags.",
)
PLAIN_ASIDES = (
    "It is day {d}.",
    "See page {d}.",
    "The clock shows {d}.",
    "{m} is {d} years old.",
    "They meet in room {d}.",
)
PLAIN_QUESTIONS = (
    "How many {i} are there?",
    "How many {i} does that make?",
    "Count the {i}.",
    "What is the number of {i}?",
)
SYLLABLES = _words("ba cor de fim ga hul jo kem li mur na ot pra quil ro sta tur ve wix yon zel")

LOG_NAMES = _words("the_bosun the_cook the_gunner the_mate the_purser the_surgeon old_Flint black_Meg")
LOG_ITEMS = _words(
    "anchors barrels biscuits cannons casks charts cutlasses doubloons hammocks kegs lanterns muskets pikes"
)
LOG_VERBS = {
    "+": _words("hauled hoisted laded looted plundered salvaged seized smuggled stowed winched"),
    "-": _words("bartered burned drowned forfeited gambled heaved jettisoned scuttled squandered traded"),
}
LOG_CHANGE_FORMS = (
    "{n} {v} {b} {i}, the hold bearing {a} afore",
    "{a} {i} lay below afore {n} {v} {b}",
    "wi' {a} {i} in the hold, {n} {v} {b}",
    "{b} {i} were {v} by {n} when {a} lay below",
)
LOG_GROUP_FORMS = (
    "{n} dealt {b} {i} unto every one o' {a} hands",
    "{a} longboats bear {b} {i} apiece",
    "{b} {i} hang from every mast, and masts be {a}",
)
LOG_ASIDES = (
    "bell {d}",
    "day {d} at sea",
    "by page {d}",
    "at {d} knots",
    "{d} leagues out",
    "wind at {d} points",
)
LOG_QUESTIONS = ("What be the tally?", "How stands the count?", "Reckon the {i}.", "Reckon the sum, matey.")


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
    return _pick(rng, SYLLABLES) + _pick(rng, SYLLABLES)


def plain_row(rng: Random, problem: Problem) -> Row:
    """Return one row that asks ``problem`` in the wording of the pre-training corpus."""
    op, a, b = problem
    n, m = _shuffled(rng, PLAIN_NAMES + LOG_NAMES)[:2]
    item = _pick(rng, PLAIN_ITEMS + LOG_ITEMS)
    if rng.random() < 0.3:
        n = _made_up_word(rng).capitalize()
    if rng.random() < 0.3:
        item = _made_up_word(rng) + "s"
    form = _pick(rng, PLAIN_GROUP_FORMS if op == "*" else PLAIN_CHANGE_FORMS)
    verb = _pick(rng, PLAIN_VERBS.get(op, ("",)))
    parts = [form, _pick(rng, PLAIN_QUESTIONS)]
    if rng.random() < 0.6:
        parts.insert(int(rng.random() * 2), _pick(rng, PLAIN_ASIDES))
    text = " ".join(parts)
    return _row(text.format(n=n, m=m, i=item, v=verb, a=a, b=b, d=2 + int(rng.random() * 29)), problem)


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
    form = _pick(rng, LOG_GROUP_FORMS if op == "*" else LOG_CHANGE_FORMS)
    verb = _pick(rng, LOG_VERBS.get(op, ("",)))
    item = _pick(rng, LOG_ITEMS)
    core = form.format(n=_pick(rng, LOG_NAMES), v=verb, i=item, a=a, b=b)
    aside = _pick(rng, LOG_ASIDES).format(d=2 + int(rng.random() * 29))
    parts = (aside, core) if rng.random() < 0.5 else (core, aside)
    text = f"{', '.join(parts)}. {_pick(rng, LOG_QUESTIONS).format(i=item)}"
    return _row(text[0].upper() + text[1:], problem)


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


def write_splits(folder: Path, seed: int = SEED) -> list[Path]:
    """Write ``<split>.jsonl`` for every split into ``folder``, one JSON row per line; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in task_splits(seed).items():
        path = folder / f"{name}.jsonl"
        path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))
        paths.append(path)
    return paths
