"""`bilora-ray predict`: what an adapter makes of a prompt, or of each row of a file."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from bilora_ray.cli.options import (
    absolute,
    finite,
    json_option,
    print_json,
    set_option,
    storage_option,
    study_database_option,
    telling_of_gpu_memory,
    trial_option,
)
from bilora_ray.cli.tables import in_quotes
from bilora_ray.config import TASK_FACTS, TRAINING_SETTINGS, TrialConfig
from bilora_ray.digests import check_template
from bilora_ray.errors import MachineError, UserError, first_line, nearest
from bilora_ray.files import atomic_file
from bilora_ray.paths import have_home, kind_of, locate_here
from bilora_ray.search.space_file import absolute_sources, parse_override
from bilora_ray.threads import use_fitting_threads
from bilora_ray.words import duration

if TYPE_CHECKING:
    from bilora_ray.release.server import Server, Verdict
    from bilora_ray.training.data.sources import Record
    from bilora_ray.training.prediction.answers import Asked
    from bilora_ray.training.prediction.sampling import Sampling
    from bilora_ray.training.tasks.base import Answer

EPILOG = """\b
Examples:
  bilora-ray predict my-adapter "Tom has 3 apples and buys 4. How many has he?"
  echo "How many legs have 3 cats?" | bilora-ray predict quickstart
  bilora-ray predict my-adapter --base-model "What is 12 less 5?"
  bilora-ray predict my-adapter --data questions.csv --output answers.jsonl
  bilora-ray predict quickstart --trial 3 --temperature 0.7 --seed 1 "What is 12 less 5?"
  bilora-ray predict my-adapter --server http://127.0.0.1:8000 --data questions.jsonl
"""
SUFFIX = ".jsonl"
# Rows that are tokenized and answered at one time: enough for passes of rows of like length.
AT_ONCE = 4096
LOG_EVERY_S = 60.0
# So many labels of a prompt are shown, the likeliest first; JSON has all.
MOST_LABELS = 10
# What a row gets, after its own columns.
PREDICTION, PROBABILITIES, OF_BASE = "prediction", "probabilities", "base_model_"
ADDED = (PREDICTION, PROBABILITIES, OF_BASE + PREDICTION, OF_BASE + PROBABILITIES)


@click.command(epilog=EPILOG)
@click.argument("adapter", metavar="ADAPTER")
@click.argument("prompt", required=False)
@click.option("--data", metavar="FILE", help="Rows to ask instead of PROMPT: any file that a training reads.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="A new .jsonl file for --data.  [default: stdout]"
)
@click.option("--base-model", is_flag=True, help="Ask the base model too, and show both.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Of a text.  [default: the training's]")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    metavar="T",
    help="Draw each token instead of taking the likeliest one.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    metavar="P",
    help="Draw from the likeliest tokens that have the probability P together.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of what is drawn.  [default: 0]")
@click.option("--server", metavar="URL", help="Ask this OpenAI-compatible server, and see whether the adapter answers.")
@click.option("--model", metavar="NAME", help="What the server calls the adapter.  [default: the one it has]")
@set_option
@trial_option
@storage_option
@study_database_option
@json_option
def command(
    adapter: str,
    prompt: str | None,
    data: str | None,
    output: Path | None,
    base_model: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    server: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    number: int | None,
    storage_path: Path,
    study_database: str | None,
    as_json: bool,
) -> None:
    """Ask ADAPTER: the folder of an adapter or of a merged model, or a study, of which the best is taken.

    What is read is made as in training and evaluation. PROMPT fills the one column of the training's prompt_template;
    where that has several columns, or a text is one of a pair, it is a JSON object of them. Where chats were learned it
    is the user's message, behind the training's system_prompt; of words it is the words, and of images the path of one.
    Without PROMPT, or where it is -, stdin is the prompt.

    Rows of --data need no answers; a chat that ends with the assistant's turn is asked for that turn anew. A row comes
    out with its own columns, its `prediction` and, of labels, their `probabilities`, and with --base-model with those
    of the base model; of words these are lists, for the words that max_length lets be read.

    Texts are greedy, as they are evaluated, unless --temperature or --top-p is given; then a row's text depends on
    --seed and the row's number alone.

    --server sends up to 8 of the prompts, those that adapter and base model answer differently, and says whose the
    server's answers are. The exit code is 1 where they are not the adapter's. OPENAI_API_KEY is sent if it is set.
    """
    chosen = _Choices(data, output, base_model, max_new_tokens, temperature, top_p, seed, server, model)
    chosen.check(prompt)
    from bilora_ray.recipe import evaluation_config, is_merged, known_of

    folder = _folder(adapter, number, storage_path, study_database)
    settings = _settings(overrides)
    if data is not None:
        settings["train_data"] = locate_here(data, Path.cwd(), "--data", True)
    # Of a merged model a name is that of its base.
    named = {"model_name_or_path"} if base_model and is_merged(folder) else set()
    of_adapter = {key: value for key, value in settings.items() if key not in named}
    config = evaluation_config(folder, of_adapter)
    have_home()
    from bilora_ray.quiet import quiet

    quiet()
    use_fitting_threads()
    from bilora_ray.training.prediction.questions import asking, question, record_of, records_of

    config = asking(config, max_new_tokens)
    _check_writes(config, chosen)
    records: Collection[Record]
    if data is None:
        records = [record_of(_typed(prompt), config)]
    else:
        with _naming_data():
            records, config = records_of(config)
    for record in records:  # all of them, before the model is loaded
        question(record, config)
        _check_columns(record)
    _check_base(folder, config)
    of_base = None
    if base_model or server is not None:
        of_base = asking(evaluation_config(folder, settings, base_model=True), max_new_tokens)
        of_base = of_base.model_copy(update={"format": config.format})
        _check_base(folder, of_base)

    if server is not None:
        from bilora_ray.release.server import Server

        endpoint = Server.at(server, os.environ.get("OPENAI_API_KEY"))
        if endpoint.sends_in_the_clear:
            _print_notes(["--server: OPENAI_API_KEY goes there unencrypted; https would hide it"])
        model = endpoint.chosen(model)

    from bilora_ray.training.prediction.answers import Asked

    with telling_of_gpu_memory("; take a smaller one: --set per_device_eval_batch_size=N"):
        asked = Asked.load(folder, config, of_base)
        notes = [*check_template(config, known_of(folder)["digests"]), *asked.notes]
        if server is not None:
            assert model is not None
            _ask_server(endpoint, model, asked, records, notes, as_json)
        elif data is None:
            _answer(asked, records, chosen.sampling(asked.config), notes, base_model, adapter, as_json)
        else:
            _answer_all(asked, records, chosen, notes, as_json)


@dataclass(frozen=True)
class _Choices:
    """The options that say what is done."""

    data: str | None
    output: Path | None
    base_model: bool
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    server: str | None
    model: str | None

    @property
    def is_drawn(self) -> bool:
        return self.temperature is not None or self.top_p is not None

    def check(self, prompt: str | None) -> None:
        """UserError unless the options go together."""
        if prompt is not None and self.data is not None:
            raise UserError("--data: is asked instead of a prompt; leave one out")
        if self.output is not None:
            self._check_output()
        for name, number in (("--temperature", self.temperature), ("--top-p", self.top_p)):
            if number is not None and not math.isfinite(number):
                raise UserError(f"{name} {number}: must be a finite number")
        if self.seed is not None and not self.is_drawn:
            raise UserError("--seed: decides nothing of greedy texts; give --temperature or --top-p")
        if self.model is not None and self.server is None:
            raise UserError("--model: is what a server calls the adapter; give --server")
        if self.server is not None:
            given = {"--output": self.output, "--temperature": self.temperature, "--top-p": self.top_p}
            for option, value in {**given, "--base-model": self.base_model or None}.items():
                if value is not None:
                    raise UserError(f"{option}: says nothing beside --server, whose greedy answers are compared")

    def _check_output(self) -> None:
        assert self.output is not None
        if self.data is None:
            raise UserError("--output: is for the rows of --data; a prompt's answer is printed")
        if self.output.suffix != SUFFIX:
            raise UserError(f"--output {self.output}: is written as JSON lines; its name must end with {SUFFIX}")
        if self.output.exists():
            raise UserError(f"--output {self.output}: exists already")
        if not absolute(self.output).parent.is_dir():
            raise UserError(f"--output {self.output}: no such folder: {absolute(self.output).parent}")

    def sampling(self, config: TrialConfig) -> Sampling | None:
        """How a text is drawn; None: greedily."""
        if not self.is_drawn:
            return None
        from bilora_ray.training.prediction.sampling import Sampling

        return Sampling(self.temperature or 1.0, self.top_p or 1.0, self.seed or 0, config.max_new_tokens)


def _folder(adapter: str, number: int | None, storage_path: Path, study_database: str | None) -> Path:
    """The folder that ADAPTER names, or that of the best trial of the study of that name."""
    from bilora_ray.recipe import CONFIG, RECIPE

    path = Path(adapter)
    if adapter.startswith("~"):
        path = absolute(path)
    is_exported = any((path / name).is_file() for name in (RECIPE, CONFIG))
    if number is None and (is_exported or len(path.parts) != 1):
        return path
    from bilora_ray.library.exporting import choose
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database, study_names
    from bilora_ray.search.study.studies import LISTED

    layout = Layout(absolute(storage_path), study_database)
    with naming_the_database(layout, then=""):
        known = study_names(layout)
    if adapter not in known and number is None:
        if path.is_dir():
            return path  # who reads it says what is missing
        hint = f"; {nearest(adapter, known, LISTED)}" if known else ""
        raise UserError(f"{adapter}: no such folder, and no study of {layout.database}{hint}")
    return choose(layout, adapter, number).adapter


@contextmanager
def _naming_data() -> Iterator[None]:
    """Call what is read by the name of the option, and not by that of the setting that a training has for it."""
    try:
        yield
    except UserError as error:
        setting, colon, line = str(error).partition(":")
        if setting != "train_data":
            raise
        raise type(error)(f"--data{colon}{line}") from None


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for override in overrides:
        section, key, value = parse_override(override)
        if section != "trial":
            raise UserError(f"--set {override}: a prediction has settings of a trial only")
        if key == "train_data":
            raise UserError(f"--set {override}: is --data here")
        if key in TRAINING_SETTINGS:
            raise UserError(f"--set {override}: changes nothing in a prediction, which trains nothing")
        settings |= absolute_sources({key: value}, Path.cwd(), "--set trial")
    return settings


def _typed(prompt: str | None) -> str:
    """The prompt that was typed, or came in on stdin; less the line end that `echo` adds."""
    if prompt not in (None, "-"):
        assert prompt is not None
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise UserError("nothing is asked: give a prompt, --data FILE, or a prompt on stdin")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: is no UTF-8 text ({error.reason})") from None


def _check_writes(config: TrialConfig, chosen: _Choices) -> None:
    if TASK_FACTS[config.task].generates:
        return
    for option, value in (
        ("--temperature", chosen.temperature),
        ("--top-p", chosen.top_p),
        ("--server", chosen.server),
    ):
        if value is not None:
            raise UserError(f"{option}: {config.task} writes no text")


def _check_columns(record: Record) -> None:
    """UserError where a row has a column that the answers would take the place of."""
    if taken := [name for name in ADDED if name in record.columns]:
        raise UserError(f"{record.where}: has a column '{taken[0]}', which is what the answer is called; rename it")


def _check_base(folder: Path, config: TrialConfig) -> None:
    name = config.model_name_or_path
    if kind_of(name, is_data=False) == "local" and not Path(name).is_dir():
        cure = "--set model_name_or_path=FOLDER says where it is now"
        raise UserError(f"{folder}: its base model is gone: no such folder: {name}; {cure}")


def _answer(
    asked: Asked,
    records: Collection[Record],
    sampling: Sampling | None,
    notes: Sequence[str],
    base_model: bool,
    adapter: str,
    as_json: bool,
) -> None:
    """Print the answer to one prompt."""
    from bilora_ray.training.prediction.questions import question

    examples, cut = asked.examples([question(record, asked.config) for record in records])
    notes = [*notes, *_told_of_cut(cut, 1, asked.config)]
    found = {adapter: asked.answers(examples, sampling)[0]}
    if base_model:
        found["base model"] = asked.answers(examples, sampling, base_model=True)[0]
    if as_json:
        print_json({**_added(list(found.values())), **({"notes": notes} if notes else {})})
        return
    _print_notes(notes)
    for place, (whose, answer) in enumerate(found.items()):
        if base_model:
            click.secho(f"{'' if place == 0 else chr(10)}{whose}:", bold=True)
        for line in _lines(answer, examples[0].reference.split(" ")):
            click.echo(line)


def _lines(answer: Answer, words: Sequence[str]) -> Iterator[str]:
    if isinstance(answer.probabilities, list):
        read = [word for word in words if word.strip()]
        for word, tag, likely in zip(read, answer.prediction, answer.probabilities, strict=False):
            yield f"{word:<20} {tag:<12} {likely[tag]:.4f}"
        return
    if isinstance(answer.prediction, list):
        yield ", ".join(answer.prediction) or "(none of the labels)"
    else:
        yield f"{answer.prediction:.6g}" if isinstance(answer.prediction, float) else str(answer.prediction)
    if answer.probabilities is not None:
        likeliest = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])
        width = max(len(name) for name, _ in likeliest[:MOST_LABELS])
        for name, share in likeliest[:MOST_LABELS]:
            yield f"  {name:<{width}}  {share:.4f}"
        if len(likeliest) > MOST_LABELS:
            yield f"  ... {len(likeliest)} labels in all"


def _added(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a row gets of the adapter's answer and, if it is there, of the base model's."""
    found: dict[str, Any] = {}
    for prefix, answer in zip(("", OF_BASE), answers, strict=False):
        found[prefix + PREDICTION] = answer.prediction
        if answer.probabilities is not None:
            found[prefix + PROBABILITIES] = answer.probabilities
    return found


def _answer_all(
    asked: Asked, records: Collection[Record], chosen: _Choices, notes: Sequence[str], as_json: bool
) -> None:
    """Write the answer to each row."""
    _print_notes(notes)
    started, count, output = time.monotonic(), len(records), chosen.output
    try:
        with nullcontext(sys.stdout) if output is None else atomic_file(absolute(output)) as file:
            cut = _write(asked, records, chosen, file)
    except OSError as error:
        if output is None:
            raise
        raise MachineError(f"--output {output}: cannot be written ({error.strerror or first_line(error)})") from None
    told = list(_told_of_cut(cut, count, asked.config))
    _print_notes(told)
    if output is None:
        return
    if as_json:
        said = [*notes, *told]
        print_json({"output": str(absolute(output)), "rows": count, **({"notes": said} if said else {})})
    else:
        rows = f"{count} row{'s' if count > 1 else ''}"
        click.echo(f"{rows} answered in {duration(time.monotonic() - started)}; they are in {output}")


def _write(asked: Asked, records: Collection[Record], chosen: _Choices, file: IO[str]) -> int:
    """Write each row with its answer; how many of them lost a part to `max_length`."""
    from bilora_ray.training.prediction.questions import chunks

    sampling, first, cut = chosen.sampling(asked.config), 0, 0
    models = (False, True) if chosen.base_model else (False,)
    with _progress(len(records) * len(models), "answers") as told:
        for some, rows in chunks(records, asked.config, AT_ONCE):
            examples, lost = asked.examples(rows)
            found = [asked.answers(examples, sampling, first, told, base_model) for base_model in models]
            for record, answers in zip(some, zip(*found, strict=True), strict=True):
                file.write(_line({**record.columns, **_added(answers)}))
            first, cut = first + len(some), cut + lost
    return cut


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(finite(row), ensure_ascii=False, default=_as_json)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, in a column that is not read
        text = json.dumps(finite(row), default=_as_json)
    return f"{text}\n"


def _as_json(value: Any) -> Any:
    """What tables hold and JSON has not."""
    if isinstance(value, bytes):  # an image's, which JSON cannot hold
        return None
    if isinstance(value, Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, date | clock_time) else str(value)


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """Takes how many more are done, for a person to see on stderr; a log gets a line a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(what, total=total)
            yield lambda more: shown.advance(task, more)
        return
    done, begun, last = 0, time.monotonic(), time.monotonic()

    def tell(more: int) -> None:
        nonlocal done, last
        done, now = done + more, time.monotonic()
        if now - last >= LOG_EVERY_S and done < total:
            left, last = (now - begun) / done * (total - done), now
            console.print(f"{done} of {total} {what}, about {duration(left)} left", soft_wrap=True)

    yield tell


def _told_of_cut(cut: int, rows: int, config: TrialConfig) -> Iterator[str]:
    if cut:
        yield f"max_length: {cut} of {rows} rows lost tokens, as in an evaluation ({config.max_length} with the text)"


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)


def _ask_server(
    server: Server, model: str, asked: Asked, records: Collection[Record], notes: Sequence[str], as_json: bool
) -> None:
    """Say whose the server's answers are; exit code 1 where they are not the adapter's."""
    from bilora_ray.release.server import compare

    if not as_json:
        _print_notes(notes)
    verdict = compare(server, model, asked, records)
    if as_json:
        print_json({**verdict.as_dict(), **({"notes": notes} if notes else {})})
    else:
        _print_verdict(verdict)
    if verdict.whose != "adapter":
        sys.exit(1)


def _print_verdict(verdict: Verdict) -> None:
    first, *others = verdict.lines()
    click.secho(f"Model '{verdict.model}': {first}", fg="green" if verdict.whose == "adapter" else "red")
    for line in others:
        click.echo(f"{line[0].upper()}{line[1:]}.")
    for row in [row for row in verdict.rows if row.whose != "adapter"][:1]:
        for whose in ("prompt", "server", "adapter", "base_model"):
            click.echo(f"  {whose.replace('_', ' '):<11} {in_quotes(getattr(row, whose))}")
