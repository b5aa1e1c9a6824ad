"""`bilora-ray predict`: what an adapter makes of a prompt, or of each row of a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bilora_ray.cli.answers import ADDED, answer_all, answer_prompt, print_notes
from bilora_ray.cli.choices import Choices
from bilora_ray.cli.options import (
    absolute,
    json_option,
    set_option,
    storage_option,
    study_database_option,
    telling_of_gpu_memory,
    trial_option,
)
from bilora_ray.cli.whose import ask_server
from bilora_ray.config import TrialConfig
from bilora_ray.digests import check_template
from bilora_ray.errors import UserError, nearest
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import have_home, kind_of, locate_here
from bilora_ray.search.space_file import absolute_sources, parse_override
from bilora_ray.settings import TRAINING_SETTINGS
from bilora_ray.threads import use_fitting_threads

if TYPE_CHECKING:
    from bilora_ray.training.data.sources import Record

EPILOG = """\b
Examples:
  bilora-ray predict my-adapter "Tom has 3 apples and buys 4. How many has he?"
  echo "How many legs have 3 cats?" | bilora-ray predict quickstart
  bilora-ray predict my-adapter --base-model "What is 12 less 5?"
  bilora-ray predict my-adapter --data questions.csv --output answers.jsonl
  bilora-ray predict quickstart --trial 3 --temperature 0.7 --seed 1 "What is 12 less 5?"
  bilora-ray predict my-adapter --server http://127.0.0.1:8000 --data questions.jsonl
"""


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
    chosen = Choices(data, output, base_model, max_new_tokens, temperature, top_p, seed, server, model)
    chosen.check(prompt)
    from bilora_ray.recipe import evaluation_config, is_whole, known_of

    folder = _folder(adapter, number, storage_path, study_database)
    settings = _settings(overrides)
    if data is not None:
        settings["train_data"] = locate_here(data, Path.cwd(), "--data", True)
    # Of a merged model a name is that of its base.
    named = {"model_name_or_path"} if base_model and is_whole(folder) else set()
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
            print_notes(["--server: OPENAI_API_KEY goes there unencrypted; https would hide it"])
        model = endpoint.chosen(model)

    from bilora_ray.training.prediction.answers import Asked

    with telling_of_gpu_memory("; take a smaller one: --set per_device_eval_batch_size=N"):
        asked = Asked.load(folder, config, of_base)
        notes = [*check_template(config, known_of(folder)["digests"]), *asked.notes]
        if server is not None:
            assert model is not None
            ask_server(endpoint, model, asked, records, notes, as_json)
        elif data is None:
            answer_prompt(asked, records, chosen.sampling(asked.config), notes, base_model, adapter, as_json)
        else:
            answer_all(asked, records, chosen, notes, as_json)


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


def _check_writes(config: TrialConfig, chosen: Choices) -> None:
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
