"""What an adapter answers: to one prompt on the terminal, and to the rows of a file behind their own columns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from datetime import time as clock_time
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any

import click

from bilora_ray.cli.choices import Choices
from bilora_ray.cli.options import absolute, print_json
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, first_line
from bilora_ray.files import atomic_file
from bilora_ray.words import duration, finite

if TYPE_CHECKING:
    from bilora_ray.training.data.sources import Record
    from bilora_ray.training.prediction.answers import Asked
    from bilora_ray.training.prediction.sampling import Sampling
    from bilora_ray.training.tasks.base import Answer

# Rows that are tokenized and answered at one time: enough for passes of rows of like length.
AT_ONCE = 4096
LOG_EVERY_S = 60.0
# So many labels of a prompt are shown, the likeliest first; JSON has all.
MOST_LABELS = 10
# What a row gets, after its own columns.
PREDICTION, PROBABILITIES, OF_BASE = "prediction", "probabilities", "base_model_"
ADDED = (PREDICTION, PROBABILITIES, OF_BASE + PREDICTION, OF_BASE + PROBABILITIES)


def answer_prompt(
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
    print_notes(notes)
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


def answer_all(asked: Asked, records: Collection[Record], chosen: Choices, notes: Sequence[str], as_json: bool) -> None:
    """Write the answer to each row."""
    print_notes(notes)
    started, count, output = time.monotonic(), len(records), chosen.output
    try:
        with nullcontext(sys.stdout) if output is None else atomic_file(absolute(output)) as file:
            cut = _write(asked, records, chosen, file)
    except OSError as error:
        if output is None:
            raise
        raise MachineError(f"--output {output}: cannot be written ({error.strerror or first_line(error)})") from None
    told = list(_told_of_cut(cut, count, asked.config))
    print_notes(told)
    if output is None:
        return
    if as_json:
        said = [*notes, *told]
        print_json({"output": str(absolute(output)), "rows": count, **({"notes": said} if said else {})})
    else:
        rows = f"{count} row{'s' if count > 1 else ''}"
        click.echo(f"{rows} answered in {duration(time.monotonic() - started)}; they are in {output}")


def _write(asked: Asked, records: Collection[Record], chosen: Choices, file: IO[str]) -> int:
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


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
