"""From a data file to the settings of a first search: its rows are read as a trial reads them, and looked at."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.measures import EXACT_MATCH, TASK_FACTS, Task
from bilora_ray.paths import BUILTIN, holds_images, kind_of, locate_here
from bilora_ray.search.drafting.bases import Base, base_of, default_base, in_words
from bilora_ray.search.drafting.columns import look_at
from bilora_ray.search.drafting.firsts import FIRSTS
from bilora_ray.search.drafting.lengths import Lengths, lengths_of, rounded_up
from bilora_ray.search.drafting.roles import Roles, Writes, roles_of
from bilora_ray.search.preflight import positions
from bilora_ray.search.space import STUDY_NAME, is_expression
from bilora_ray.settings import SOURCES, applies, takes_mapping
from bilora_ray.training.data.formats import in_format
from bilora_ray.training.data.labels import LabelCounts, by_label
from bilora_ray.training.data.sources import read_train
from bilora_ray.training.rows import about, load_rows, notes
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset

Given = Mapping[str, Mapping[str, Any]]
# With a GPU, and without: trials, optimizer steps of one, tokens of a row and training rows at the most.
TRIALS = {True: 20, False: 12}
STEPS = {True: 300, False: 150}
MOST_TOKENS = {True: 2048, False: 512}
MOST_ROWS = {True: None, False: 4000}
MOST_EPOCHS = 12
# Rows that are held out at the most; where texts are written for each, without a GPU.
MOST_HELD_OUT, MOST_WRITTEN_TO = 1000, 200
# Of fewer rows a larger share is held out than by default, if nothing else is said.
MANY_ROWS, OF_FEW = 200, 0.2
HOLDING_OUT = {"validation_data", "validation_split", "validation_fraction"}
# Rows of a step, of a model that writes and of another; a smaller step where an epoch would have fewer steps than this.
STEP_ROWS, FEWEST_STEPS = {True: 8, False: 32}, 8
# An answer of so many words is right or wrong as a whole, if nearly all are as short.
CLOSED_WORDS, CLOSED_CHARACTERS, NEARLY_ALL = 3, 60, 0.95
# An answer behind its working, as GSM8K has it.
MARKED = r"#### (-?[\d.,]*\d)"
# Accuracy says little where one label of two has such a share, or one of several so many times the rows of the rarest.
UNEVEN_OF_TWO, UNEVEN = 0.65, 3


@dataclass(frozen=True)
class Line:
    """A setting of the file, with what is to be said of it."""

    section: str
    key: str
    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Draft:
    """A space file before it is written.

    Attributes:
        lines: its settings, in order.
        told: what was seen, a line each.
        doubts: what could have been meant otherwise, each with the option that says so.
        notes: what is allowed and yet seldom meant.
    """

    lines: Sequence[Line]
    told: Sequence[str]
    doubts: Sequence[str]
    notes: Sequence[str]


def draft(data: str, model: str | None, asked: Task | None, given: Given, output: Path, gpus: int) -> Draft:
    """A first search over `data`.

    Args:
        data: a local path from the current folder, `builtin:NAME`, or a Hub dataset.
        model: the base model, likewise; None: one that suits.
        asked: what is learned; None: what the columns are made for.
        given: settings that are said, by section. Relative paths in them start at the current folder.
        output: where the file will be; relative paths in it start there.
        gpus: of this machine.

    Raises:
        UserError: the data or the model are missing or malformed, or nothing in them could be learned.
    """
    sources = {key: value for key, value in given["trial"].items() if key in SOURCES and isinstance(value, str)}
    sources |= {"train_data": data} | ({} if model is None else {"model_name_or_path": model})
    sources = {key: _located(key, name) for key, name in sources.items()}
    named = None if model is None else base_of(sources["model_name_or_path"], asked or "causal-lm")
    roles = _roles(sources["train_data"], given["trial"], asked, None if named is None else named.writes)
    base = named or default_base(roles.task, gpus)
    settings = {**roles.settings, **given["trial"], **sources, "model_name_or_path": base.name, "task": roles.task}
    config = build(TrialConfig, {**_fixed(settings), "metric": "eval_loss"}, "--set trial")
    rows = load_rows(config, beginning=True)
    if len(rows.train) + len(rows.validation) < MANY_ROWS and not config.model_fields_set & HOLDING_OUT:
        config = config.model_copy(update={"validation_fraction": OF_FEW})
        rows = load_rows(config, beginning=True)
    config = config.model_copy(update={"format": rows.format})
    lengths = lengths_of(config, rows, has_tokenizer=base.missing is None)
    judged = list(_judged(config, rows))
    writes = any(line.key == "predict_with_generate" for line in judged)
    lines = [
        *_study(config, base, given["trial"], gpus > 0),
        *_data(roles, config, output.parent),
        *_length(config, lengths, writes, gpus > 0),
        *_method(base, config),
        *_course(config, base, rows, writes, gpus > 0),
        *judged,
        *_resources(gpus > 0),
    ]
    relative = {key: _from(output.parent, name) for key, name in sources.items()}
    said = {**given, "trial": {**given["trial"], **relative}}
    config = config.model_copy(update={line.key: line.value for line in judged})
    told = list(_told(config, base, roles, rows, lengths))
    return Draft(
        _with(lines, said), told, roles.doubts, [*roles.notes, *_of_size(base, gpus > 0), *notes(rows, config, 1)]
    )


def _located(key: str, name: str) -> str:
    options = {"train_data": "--data", "model_name_or_path": "--model"}
    return locate_here(name, Path.cwd(), options.get(key, f"--set {key}"), SOURCES[key] != "model")


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` less what trials differ in."""
    return {
        key: value
        for key, value in settings.items()
        if not (isinstance(value, dict) and not takes_mapping(key)) and not is_expression(key, value)
    }


def _roles(data: str, trial: Mapping[str, Any], asked: Task | None, writes: Writes | None) -> Roles:
    """By the first rows; where the settings say what is read, that."""
    images = kind_of(data, is_data=True) == "local" and Path(data).is_dir() and holds_images(Path(data))
    read_as = asked or ("image-classification" if images else "causal-lm")
    reading = {**_fixed(trial), "model_name_or_path": "-", "train_data": data, "task": read_as, "metric": "eval_loss"}
    config = build(TrialConfig, {**reading, "check_labels": False}, "--set trial")
    if config.messages_column or config.format:
        return Roles(asked or "causal-lm", "the settings say what is read", {})
    records = list(read_train(config, beginning=True).beginning().records)
    found = None if images else in_format(config.model_copy(update={"task": "causal-lm"}), records).format
    return roles_of(look_at(records), found, asked, writes, trial)


# What the lines of the file are decided by.


def _study(config: TrialConfig, base: Base, trial: Mapping[str, Any], gpu: bool) -> Iterator[Line]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.train_data.rpartition(":")[2]).stem).strip("-._")
    yield Line("study", "name", name if STUDY_NAME.fullmatch(name) else "my-study")
    yield Line("study", "num_trials", TRIALS[gpu], "`bilora-ray tune --extend 10` runs more afterwards")
    searched = {"rank": 8, "auxiliary_rank": 8, "rho": 0.05, "learning_rate": base.rates[2]}
    if point := {key: value for key, value in searched.items() if key not in trial and applies(key, config.method)}:
        comment = "No trial is stopped before a quarter of its rows (grace_period says otherwise). This one runs first:"
        yield Line("study", "points_to_evaluate", [point], comment)


def _data(roles: Roles, config: TrialConfig, folder: Path) -> Iterator[Line]:
    yield Line("trial", "model_name_or_path", _from(folder, config.model_name_or_path))
    yield Line("trial", "task", roles.task)
    yield Line("trial", "train_data", _from(folder, config.train_data))
    if config.validation_data is None and config.validation_split is None:
        comment = "of the rows, to judge by, alike in all trials"
        yield Line("trial", "validation_fraction", config.validation_fraction, comment)
    yield from (Line("trial", key, value) for key, value in roles.settings.items())


def _length(config: TrialConfig, lengths: Lengths, writes: bool, gpu: bool) -> Iterator[Line]:
    """What holds the longest row, unless that is far longer than the others or than there is room for."""
    if not lengths.whole:
        return
    new = rounded_up(lengths.answers[-1]) if writes else 0
    together = lengths.prompts[-1] + new if writes and TASKS[config.task].continues else 0
    longest, common = max(lengths.whole[-1], together), lengths.whole[99 * (len(lengths.whole) - 1) // 100]
    needed = rounded_up(longest if longest <= 2 * max(common, together) else common)
    most = min(positions(config) or MOST_TOKENS[gpu], MOST_TOKENS[gpu])
    length = min(needed, most)
    if cut := sum(tokens > length for tokens in lengths.whole):
        bound = "what the model takes" if most < MOST_TOKENS[gpu] else "enough for a first search"
        what = f"tokens; {bound if length == most else 'most rows have fewer'}: {cut} of {len(lengths.whole)} are cut"
    else:
        what = "tokens, which hold the longest row" + (" and its answer" if together == longest else "")
    yield Line("trial", "max_length", length, f"{what}{' (a guess)' if lengths.guessed else ''}")
    if writes:
        room = new if length >= together else min(new, length // 2)
        yield Line("trial", "max_new_tokens", room, "tokens of an answer at the most")


def _method(base: Base, config: TrialConfig) -> Iterator[Line]:
    """The method, and the ranges of what it reads."""
    low, high, _ = base.rates
    of = "most models" if base.parameters is None else f"models of {in_words(base.parameters)} parameters"
    searched: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("rank", {"choice": [4, 8, 16]}, "of the adapter that is kept"),
        ("auxiliary_rank", {"choice": [2, 4, 8]}, "of the one that looks for sharpness"),
        ("rho", {"low": 0.005, "high": 1.0, "log": True}, "how far around the weights it looks"),
        ("learning_rate", {"low": low, "high": high, "log": True}, f"where {of} learn"),
    )
    yield Line("trial", "method", config.method)
    yield from (Line("trial", key, range_, why) for key, range_, why in searched if applies(key, config.method))


def _course(config: TrialConfig, base: Base, rows: Dataset, writes: bool, gpu: bool) -> Iterator[Line]:
    train, most = len(rows.train), MOST_ROWS[gpu]
    if most is not None and train > most:
        yield Line("trial", "max_train_samples", most, f"of {train}, for there is no GPU; without this line all")
        train = most
    each = STEP_ROWS[TASK_FACTS[config.task].generates]
    while each > 2 and train < FEWEST_STEPS * each:
        each //= 2
    steps = ceil(train / each)
    epochs = min(max(ceil(STEPS[gpu] / steps), 1), MOST_EPOCHS)
    yield Line("trial", "per_device_train_batch_size", each)
    yield Line("trial", "num_train_epochs", epochs, f"{epochs * steps} steps a trial")
    held_out = MOST_WRITTEN_TO if writes and not gpu else MOST_HELD_OUT
    if len(rows.validation) > held_out:
        yield Line("trial", "max_eval_samples", held_out, f"of {len(rows.validation)}, so that evaluations are quicker")


def _judged(config: TrialConfig, rows: Dataset) -> Iterator[Line]:
    """The metric, and what it needs."""
    first = FIRSTS[config.task]
    if first.metric is not None:
        yield Line("trial", "metric", first.metric, first.why)
    elif TASK_FACTS[config.task].generates:
        yield from _by_answers([row.completion for row in rows.train])  # type: ignore[attr-defined]
    else:
        yield from _by_labels(LabelCounts.of(rows, TASKS[config.task].labels))


def _by_answers(answers: Sequence[str]) -> Iterator[Line]:
    """Right or wrong as a whole are answers that are marked, or of few words."""
    marked = all(re.search(MARKED, text) for text in answers)
    short = sum(len(text.split()) <= CLOSED_WORDS and len(text) <= CLOSED_CHARACTERS for text in answers)
    if marked:
        why = "answers stand behind ####"
    elif short >= NEARLY_ALL * len(answers):
        why = f"answers have {CLOSED_WORDS} words or fewer"
    else:
        why = f"of long answers; {EXACT_MATCH}, with predict_with_generate: true, is for such as are right or wrong"
        yield Line("trial", "metric", "eval_loss", why)
        return
    yield Line("trial", "predict_with_generate", True)
    if marked:
        yield Line("trial", "answer_pattern", MARKED)
    yield Line("trial", "metric", EXACT_MATCH, f"{why}: each is right or wrong")


def _by_labels(counts: LabelCounts) -> Iterator[Line]:
    each = by_label(counts.train)
    order = sorted(each, key=lambda label: (each[label], label))
    rarest, commonest = order[0], order[-1]
    share, two = each[commonest] / each.total(), len(counts.names) == 2
    if share <= UNEVEN_OF_TWO if two else each[commonest] < UNEVEN * each[rarest]:
        yield Line("trial", "metric", "eval_accuracy", "no label has far more rows than another")
        return
    why = f"'{counts.names[commonest]}' has {share:.0%} of the rows, so that accuracy would say little"
    yield Line("trial", "metric", "eval_f1", why)
    if two:
        yield Line("trial", "positive_label", counts.names[rarest], "which eval_f1 is of: the rarer one")


def _resources(gpu: bool) -> Iterator[Line]:
    if gpu:
        yield Line("resources", "gpus_per_worker", 1, "as many trials run at one time as there are GPUs")


def _told(config: TrialConfig, base: Base, roles: Roles, rows: Dataset, lengths: Lengths) -> Iterator[str]:
    here, some = Path.cwd(), "the beginning of " if rows.partial else ""
    split = f"{len(rows.train)} rows to train on, {len(rows.validation)} to judge by"
    yield f"data: {some}{_from(here, config.train_data)}, {split}"
    yield f"task: {config.task}; {roles.why}"
    yield from about(rows, config)
    if lengths.whole:
        yield lengths.line
    size = "" if base.parameters is None else f", about {in_words(base.parameters)} parameters"
    yield f"model: {_from(here, base.name)}{size}{base.why and '; '}{base.why}"
    if base.missing is not None:
        yield f"model: could not be looked at: {base.missing}"


def _of_size(base: Base, gpu: bool) -> Iterator[str]:
    if (base.parameters or 0) > 1e9 and not gpu:
        yield f"model_name_or_path: {base.name} wants a GPU, and there is none here"


def _with(lines: Sequence[Line], given: Given) -> list[Line]:
    """`lines` with the values that are said; those of no line come behind the others of their section."""
    known = {(line.section, line.key) for line in lines}
    found = []
    for line in lines:
        value = given[line.section].get(line.key, line.value)
        found.append(line if value == line.value else Line(line.section, line.key, value))
    return found + [
        Line(section, key, value)
        for section, settings in given.items()
        for key, value in settings.items()
        if (section, key) not in known
    ]


def _from(folder: Path, name: str) -> str:
    """A source as a file in `folder` names it: a local one by a relative path that can be nothing else."""
    if name.startswith(BUILTIN) or not Path(name).is_absolute():
        return name
    relative = os.path.relpath(name, folder.resolve())
    return relative if relative.startswith("..") or Path(relative).suffix else f"./{relative}"
