"""What columns are to a task: by what is in them first, by their names where that leaves a choice.

Who takes one of several says so: `Roles` has the others, and what would take them instead.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bilora_ray.config import template_columns
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.search.drafting.columns import Column
from bilora_ray.search.drafting.firsts import FIRSTS
from bilora_ray.training.data.columns import listed

# What an answer may be.
ANSWERING = FIRSTS["causal-lm"].labels
Writes = Literal["causal-lm", "seq2seq-lm", "nothing"]
# What people call a column, the likeliest first. Of a name of several words each is looked at.
ANSWERS = ("completion", "answer", "answers", "response", "reply", "output", "solution", "summary", "translation")
ASKED = (
    *("prompt", "question", "instruction", "query", "input", "message", "body", "text", "sentence", "document"),
    *("article", "content", "review", "comment", "request", "description", "context", "source", "title"),
    *("tokens", "words", "image"),
)
LABELS = ("label", "labels", "class", "category", "intent", "sentiment", "topic", "tags", "target", "rating", "score")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("query", "passage"),
)
PLAIN = (
    "data: plain text is learned line by line; for answers or labels, give a table with a column of each (docs/data.md)"
)


@dataclass(frozen=True)
class Roles:
    """What the columns are to a task.

    Attributes:
        task: what is learned.
        why: that, in words.
        settings: those that name the columns.
        doubts: lines on what could have been meant instead, each with the option of `init` that says it.
        notes: lines on what is seldom meant.
    """

    task: Task
    why: str
    settings: dict[str, Any]
    doubts: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


def roles_of(
    columns: Sequence[Column], found: str | None, asked: Task | None, writes: Writes | None, said: Mapping[str, Any]
) -> Roles:
    """What the columns are to the task that is `asked` for, or to the one that they are made for.

    Args:
        columns: of the rows.
        found: their format, if it is one that is known by their names.
        asked: the task; None: the columns tell.
        writes: what the base model does with texts; None: not known.
        said: settings that are given, which go before what the columns are called.

    Raises:
        UserError: no column could be what the task learns.
    """
    names = {column.name for column in columns}
    written: Task = asked or ("causal-lm" if writes is None or writes == "nothing" else writes)
    may_write = TASK_FACTS[written].generates and writes != "nothing"
    if may_write and said.keys().isdisjoint({"label_column", "text_column"}):
        if found is not None:
            return Roles(written, f"the rows are in the format {found}", {"format": found})
        if {"prompt", "completion"} <= names:
            return Roles(written, "the rows have a prompt and a completion", {})
    found_task = asked or _task_of(columns, written, writes, said)
    return (_written if TASK_FACTS[found_task].generates else _labelled)(columns, found_task, said)


def _task_of(columns: Sequence[Column], written: Task, writes: Writes | None, said: Mapping[str, Any]) -> Task:
    """To write where a column is called an answer, or where texts are all there is; else by the kind of the label."""
    label = next((column for column in columns if column.name == said.get("label_column")), None)
    kinds = [column.kind for column in columns]
    of_labels = kinds if label is None else [label.kind]
    texts = [column for column in columns if column.kind == "text" and column is not label]
    answers = [column for column in columns if column.kind in ANSWERING and _named(column, ANSWERS)]
    if "image" in kinds:
        return "image-classification"
    if kinds.count("list") >= 2:
        return "token-classification"
    if "list" in of_labels and texts:
        return "multi-label-classification"
    if writes != "nothing" and label is None and (_says_templates(said) or (answers and len(columns) > 1)):
        return written
    if "label" in of_labels and texts:
        return "sequence-classification"
    if texts and any(column.kind == "number" and (column is label or _named(column, LABELS)) for column in columns):
        return "regression"
    if not texts or writes == "nothing":
        raise UserError(_nothing(columns, "a text, and what is to be learned of it"))
    return written


def _says_templates(said: Mapping[str, Any]) -> bool:
    return not said.keys().isdisjoint({"prompt_template", "completion_template"})


def _nothing(columns: Sequence[Column], needed: str) -> str:
    return f"--data: no columns hold {needed} (columns: {listed([column.name for column in columns])})"


def _named(column: Column, names: Sequence[str]) -> bool:
    return not column.words.isdisjoint(names)


def _first(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """The one that is called by the first of `names` that any is called by; the first of all where none is."""
    by_name = [column for name in names for column in columns if name in column.words]
    return next(iter(by_name or columns), None)


def _written(columns: Sequence[Column], task: Task, said: Mapping[str, Any]) -> Roles:
    """Of the columns of texts: a prompt, and the completion that is written to it."""
    usable = [column for column in columns if column.kind in ANSWERING]
    texts = [column for column in usable if column.kind == "text"]
    if not usable:
        raise UserError(_nothing(columns, "a text"))
    if len(usable) == 1:
        name = usable[0].name
        settings = {"prompt_template": "", "completion_template": _in_braces(name)}
        _check_fit([name], said)
        why = f"'{name}' is learned as plain text, which answers nothing"
        return Roles(task, why, settings, tuple(_of_numbers(columns, usable)), (PLAIN, *_of_one_value(columns)))
    called = [column for column in usable if _named(column, ANSWERS)]
    in_order = texts[1:] or [column for column in usable if column not in texts[:1]]
    completion = _first(called, ANSWERS) or in_order[-1]
    rest = [column for column in texts if column is not completion]
    rest = rest or [column for column in usable if column is not completion]
    prompt = _first(rest, ASKED) or rest[0]
    settings = {"prompt_template": f"{_in_braces(prompt.name)}\n", "completion_template": _in_braces(completion.name)}
    if _says_templates(said):
        settings = {key: value for key, value in settings.items() if key not in said}
        return Roles(task, "its templates were said", settings)
    _check_fit([prompt.name, completion.name], said)
    others = [column.name for column in rest if column is not prompt and _fits(column.name)]
    doubts = []
    if not called:
        asked, written = f"{_in_braces(completion.name)}\n", _in_braces(prompt.name)
        turned = (("prompt_template", asked), ("completion_template", written))
        way = " ".join(_set(*one) for one in turned)
        doubts.append(f"by their order '{completion.name}' answers '{prompt.name}'; to turn them round: {way}")
    if others:
        every = "\n".join(_in_braces(name) for name in (column.name for column in rest) if _fits(name)) + "\n"
        doubts.append(f"nothing is read of {_listed(others)}; to read all texts: {_set('prompt_template', every)}")
    labels = [column for column in usable if column.kind == "label" and column not in (completion, prompt)]
    if label := _first(labels, LABELS):
        way = f"--task sequence-classification {_set('label_column', label.name)}"
        names = _listed([column.name for column in labels])
        doubts.append(f"nothing is learned of {names}; to learn labels: {way}")
    if completion.kind == "label":
        way = f"--task sequence-classification {_set('label_column', completion.name)}"
        doubts.append(f"'{completion.name}' has few different values; to learn them as labels: {way}")
    doubts += _of_numbers(columns, usable)
    why = f"'{completion.name}' is written to '{prompt.name}'"
    return Roles(task, why, settings, tuple(doubts), tuple(_of_one_value(columns)))


def _of_numbers(columns: Sequence[Column], usable: Sequence[Column]) -> Iterator[str]:
    """What could be learned of numbers, where there is a text to read."""
    numbers = [column for column in columns if column.kind == "number"]
    if numbers and any(column.kind == "text" for column in usable):
        number = _first(numbers, LABELS) or numbers[0]
        way = f"--task regression {_set('label_column', number.name)}"
        yield f"nothing is learned of {_listed([column.name for column in numbers])}; to learn numbers: {way}"


def _of_one_value(columns: Sequence[Column]) -> Iterator[str]:
    """That what is called like a label is none."""
    for column in columns:
        if column.same is not None and _named(column, LABELS):
            yield f"{column.name}: is '{column.same}' in every row, of which no label can be learned"


def _labelled(columns: Sequence[Column], task: Task, said: Mapping[str, Any]) -> Roles:
    """Of the columns: what is read, and its label."""
    first, named = FIRSTS[task], {column.name: column for column in columns}
    reads, of_words = first.reads, first.inputs == ("list",)
    labels = [column for kind in first.labels for column in columns if column.kind == kind]
    by_name = [column for column in labels if _named(column, LABELS)]
    # Of words the tags come behind them.
    label = named.get(said.get("label_column", "")) or _first(by_name or labels[int(of_words) :], LABELS)
    inputs = [column for column in columns if column.kind in first.inputs and column is not label]
    read = named.get(said.get(reads, "")) or _first(inputs, ASKED)
    if label is None or read is None:
        what = "an image" if reads == "image_column" else "a text"
        raise UserError(_nothing(columns, f"{what} and a label, as {task} needs them"))
    settings, pairs = {reads: read.name, "label_column": label.name}, reads == "text_column" and not of_words
    if pairs and reads not in said:
        settings |= _pair(inputs)
    used = {*settings.values(), said.get("text_pair_column")}
    doubts = []
    if others := [column.name for column in inputs if column.name not in used]:
        way = _set("text_pair_column" if pairs else reads, others[0])
        doubts.append(f"nothing is read of {_listed(others)}; to read {_listed(others[:1])}: {way}")
    if others := [column.name for column in labels if column.kind == label.kind and column.name not in used]:
        doubts.append(
            f"nothing is learned of {_listed(others)}; to learn that instead: {_set('label_column', others[0])}"
        )
    reading = " and ".join(repr(settings[key]) for key in (reads, "text_pair_column") if key in settings)
    return Roles(task, f"{first.learns} in '{label.name}' is learned of {reading}", settings, tuple(doubts))


def _pair(inputs: Sequence[Column]) -> dict[str, str]:
    """The settings of a pair of texts, if two columns are called like one."""
    by_name = {column.name.lower(): column.name for column in inputs}
    found = next((pair for pair in PAIRS if set(pair) <= by_name.keys()), None)
    return {} if found is None else {"text_column": by_name[found[0]], "text_pair_column": by_name[found[1]]}


def _listed(names: Sequence[str]) -> str:
    return listed([f"'{name}'" for name in names])


def _in_braces(name: str) -> str:
    return f"{{{name}}}"


def _fits(name: str) -> bool:
    """Whether a column of that name can stand in a template."""
    try:
        return template_columns(_in_braces(name)) == (name,)
    except ValueError:
        return False


def _check_fit(names: Sequence[str], said: Mapping[str, Any]) -> None:
    if not _says_templates(said) and (odd := [name for name in names if not _fits(name)]):
        allowed = "letters, digits, spaces, '_' and '-'"
        raise UserError(f"--data: column '{odd[0]}' is to stand in a template, whose columns have {allowed}; rename it")


def _set(key: str, value: str) -> str:
    """The option of a shell that gives `value` to a setting."""
    if re.fullmatch(r"\w+", value):
        return f"--set {key}={value}"
    return f"--set {shlex.quote(f'{key}={json.dumps(value, ensure_ascii=False)}')}"
