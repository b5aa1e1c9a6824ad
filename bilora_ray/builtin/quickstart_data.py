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
MAX_RESULT = 40
SPLIT_SIZES = {"train": 400, "validation": 200, "test": 400}
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
PLAIN_PLACES = _words("barn basket box cellar cupboard drawer kitchen shed shop yard")
PLAIN_VERBS = {
    "+": _words("added bought brought built earned fetched found gathered got made picked received won"),
    "-": _words("burnt donated dropped lent lost mislaid removed sold spent traded used wasted"),
}
PLAIN_STOCKS = (
    "{n} had {a} {i}",
    "there were {a} {i} in the {p}",
    "the {p} held {a} {i}",
    "{a} {i} lay in the {p}",
    "{a} was the number of {i}",
    "with {a} {i} in the {p}",
    "the {i} in the {p} were {a}",
)
PLAIN_CHANGES = (
    "{n} {v} {b} {i}",
    "{n} {v} {b}",
    "{n} {v} {b} of them",
    "{b} {i} were {v} by {n}",
    "{b} is what {n} {v}",
    "what {n} {v} was {b} {i}",
)
PLAIN_LINKS = (
    "{A}. Then {B}",
    "{A} and {B}",
    "{A}, {B}",
    "{A}, and later {B}",
    "first {A}, after which {B}",
    "{B}. Before that, {A}",
    "{B} when {A}",
    "{B}, {A}",
    "{B}, while {A} already",
)
PLAIN_GROUP_FORMS = (
    "there were {a} boxes with {b} {i} each",
    "{n} packed {b} {i} into each of {a} bags",
    "{a} friends of {n} had {b} {i} each",
    "each bag had {b} {i}. There were {a} bags",
    "{n} bought {b} {i} in each of {a} shops",
    "every {p} held {b} {i}, and there were {a}",
)
PLAIN_ASIDES = (
    "it was day {d}",
    "see page {d}",
    "the clock showed {d}",
    "{m} was {d} years old",
    "they met in room {d}",
    "{d} minutes went by",
    "bus {d} was late",
    "it was {d} degrees",
    "at house {d}",
    "{d} miles from home",
    "in week {d}",
    "{d} birds sang",
    "by {d} {m} was home",
    "road {d}",
    "{d} steps up",
    "the moon was {d} days old",
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
# The log tells what there is now and asks what there was before, so what was lost is added back.
LOG_VERBS = {
    "+": _words("burnt dropped lost sold traded wasted jettisoned scuttled"),
    "-": _words("bought brought fetched found gathered won looted plundered"),
}
LOG_CHANGE_FORMS = (
    "{n} {v} {b} {i}, the hold bearing {a} now",
    "{a} {i} lie below since {n} {v} {b}",
    "wi' {a} {i} now in the hold, {n} {v} {b}",
    "{b} {i} were {v} by {n}, and now {a} lie below",
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
LOG_QUESTIONS = ("What be the tally afore?", "How stood the count afore?", "Reckon the {i} afore.")


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


def _sentence(text: str) -> str:
    """Return ``text`` with a capital first letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def _plain_story(rng: Random, op: str) -> str:
    """Return a form of the plain story for ``op``, which still has its fields in braces."""
    if op == "*":
        return _pick(rng, PLAIN_GROUP_FORMS)
    story = _pick(rng, PLAIN_LINKS).replace("{A}", _pick(rng, PLAIN_STOCKS))
    return story.replace("{B}", _pick(rng, PLAIN_CHANGES)).replace("{v}", _pick(rng, PLAIN_VERBS[op]))


def plain_row(rng: Random, problem: Problem) -> Row:
    """Return one row that asks ``problem`` in the wording of the pre-training corpus."""
    op, a, b = problem
    n, m = _shuffled(rng, PLAIN_NAMES + LOG_NAMES)[:2]
    item = _pick(rng, PLAIN_ITEMS + LOG_ITEMS)
    if rng.random() < 0.3:
        n = _made_up_word(rng).capitalize()
    if rng.random() < 0.3:
        item = _made_up_word(rng) + "s"
    text = _plain_story(rng, op)
    if rng.random() < 0.7:
        pair = _shuffled(rng, [_pick(rng, PLAIN_ASIDES), text])
        text = _pick(rng, (", ", ". ", " and ")).join(pair)
    values = {"n": n, "m": m, "i": item, "p": _pick(rng, PLAIN_PLACES), "a": a, "b": b}
    text = f"{_sentence(text)} {_pick(rng, PLAIN_QUESTIONS)}"
    return _row(text.format(d=2 + int(rng.random() * 29), **values), problem)


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
    return _row(f"{_sentence(', '.join(parts))} {_pick(rng, LOG_QUESTIONS).format(i=item)}", problem)


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
