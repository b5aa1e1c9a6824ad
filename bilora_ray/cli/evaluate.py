"""`bilora-ray evaluate`: what an exported adapter is worth on data of your choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bilora_ray.cli.options import json_option, print_json, set_option, telling_of_gpu_memory
from bilora_ray.cli.tables import in_quotes
from bilora_ray.cli.waiting import waiting
from bilora_ray.config import TrialConfig
from bilora_ray.digests import check_base, check_rows, check_template
from bilora_ray.errors import UserError
from bilora_ray.paths import files_of, have_home, locate_here
from bilora_ray.records import IMPORTING
from bilora_ray.search.space_file import absolute_sources, parse_override
from bilora_ray.settings import TRAINING_SETTINGS, deciding_the_split
from bilora_ray.threads import use_fitting_threads

if TYPE_CHECKING:
    from bilora_ray.training.tasks.base import Prediction

# What a whole model says nothing of by itself.
OF_BASE = ("model_name_or_path", "model_revision")
EPILOG = """\b
Examples:
  bilora-ray evaluate my-adapter
  bilora-ray evaluate my-adapter --data test.jsonl --json
  bilora-ray evaluate my-adapter --data test.jsonl --base-model
  bilora-ray evaluate my-adapter --data test.jsonl --examples 5
"""


@click.command(epilog=EPILOG)
@click.argument("adapter", type=click.Path(path_type=Path), metavar="ADAPTER")
@click.option("--data", metavar="FILE", help="Data to measure on.  [default: the validation rows of its training]")
@click.option("--base-model", is_flag=True, help="Measure the base model alone, to compare with.")
@click.option(
    "--examples", type=click.IntRange(min=0), default=0, metavar="N", help="Show what it makes of the first N rows."
)
@set_option
@json_option
def command(
    adapter: Path, data: str | None, base_model: bool, examples: int, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Measure the adapter in folder ADAPTER, or a merged model, with the metrics that it was trained with."""
    base, own, other = (None, overrides, []) if base_model else _base_of(adapter, overrides)
    config, notes = asked(adapter, data, own, base_model)
    notes = other + notes
    measured = _measured(None if base_model else adapter, config, examples, base)
    notes += measured.notes
    if as_json:
        said = {"notes": notes} if notes else {}
        shown = {"examples": list(measured.examples)} if examples else {}
        print_json({**measured.metrics, **said, **shown})
        return
    for note in notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
    click.echo(f"{on_rows(adapter, config, measured.rows, base_model)}:")
    for key, value in measured.metrics.items():
        click.echo(f"{key:<28} {value:.6g}")
    for example in measured.examples:
        click.echo()
        for key, told in example.items():
            click.echo(f"{key:<11} {in_quotes(told) if isinstance(told, str) else f'{told:.3g}'}")


@dataclass(frozen=True)
class _Measured:
    """What came of an evaluation: the metrics of so many rows, what became of some of them, and lines about it."""

    metrics: Mapping[str, float]
    rows: int
    examples: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def asked(adapter: Path, data: str | None, overrides: Sequence[str], base_model: bool) -> tuple[TrialConfig, list[str]]:
    """The settings to measure an adapter with, and what there is to say of its rows. UserError if they are not its."""
    from bilora_ray.recipe import evaluation_config, known_of

    settings, given = _settings(data, overrides)
    config = evaluation_config(adapter, settings, base_model)
    _check_here(config)
    before = known_of(adapter)["digests"]
    for key in given:
        # A file that was moved is known by its content.
        if key in deciding_the_split(config.model_dump()) and not (key == "train_data" and key in before):
            raise UserError(
                f"--set {given[key]}: would measure on rows that the training did not hold out; give --data"
            )
    # What a training names is scored once; an evaluation reads it where it is asked to.
    config = config.model_copy(update={"retention_data": settings.get("retention_data")})
    have_home()
    return config, _compared(config, before, data, "validation_data" in given, base_model)


def _base_of(adapter: Path, overrides: Sequence[str]) -> tuple[TrialConfig | None, Sequence[str], list[str]]:
    """Where a whole model is to tell what it has forgotten: settings of its base, its own `overrides`, and a note.

    UserError if its base is not here, or has changed since.
    """
    from bilora_ray.recipe import evaluation_config, is_whole, known_of

    settings, _ = _settings(None, overrides)
    if settings.get("retention_data") is None or not is_whole(adapter):
        return None, overrides, []
    base = evaluation_config(adapter, settings, base_model=True)
    _check_here(base, ("model_name_or_path",))
    other = check_base(base, known_of(adapter))
    own = [override for override in overrides if parse_override(override)[1] not in OF_BASE]
    return base, own, [other] if other else []


def on_rows(adapter: Path, config: TrialConfig, rows: int, base_model: bool) -> str:
    """What was measured, on how many rows of which file, for people to read."""
    what = f"base model {config.model_name_or_path}" if base_model else str(adapter)
    return f"{what} on {rows} rows of {_rows(config)}"


def _settings(data: str | None, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that are not as they were in the training, and by key the texts that said so."""
    settings: dict[str, Any] = {}
    given: dict[str, str] = {}
    for override in overrides:
        section, key, value = parse_override(override)
        given[key] = override
        if section != "trial":
            raise UserError(f"--set {override}: an evaluation has settings of a trial only")
        if key in TRAINING_SETTINGS:
            raise UserError(f"--set {override}: changes nothing in an evaluation, which trains nothing")
        settings |= absolute_sources({key: value}, Path.cwd(), "--set trial")
    if data is not None:
        # The training data may be gone by now, and nothing of it is needed: the labels are in the recipe.
        source = locate_here(data, Path.cwd(), "--data", True)
        settings |= {"train_data": source, "validation_data": source, "max_eval_samples": None}
    return settings, given


def _compared(
    config: TrialConfig, before: Mapping[str, str], data: str | None, other_rows: bool, base_model: bool
) -> list[str]:
    """What there is to say of the rows and the template, beside what the training read. UserError if they differ."""
    with waiting(IMPORTING):
        from bilora_ray.quiet import quiet

        quiet()
        use_fitting_threads()
        import bilora_ray.training.evaluate  # noqa: F401 - what it takes is seconds
        from bilora_ray.training.rows import read_sources

    own_rows = data is None and not other_rows
    notes = list(check_template(config, before))
    if before and (own_rows or data is not None):
        now = {setting: source.digest for setting, source in read_sources(config).items()}
        notes += check_rows(config, before, now) if own_rows else ()
        if data is not None and not base_model and now["train_data"] == before.get("train_data"):
            notes.append(f"--data: {data} is what was trained on, so that this says nothing of other rows")
    return notes


def _measured(adapter: Path | None, config: TrialConfig, examples: int, base: TrialConfig | None) -> _Measured:
    """Measure the adapter, or the base model or whole model that `config` names alone; `base`: see `_base_of`."""
    from bilora_ray.recipe import is_whole
    from bilora_ray.training.evaluate import evaluate, load_adapted, predict
    from bilora_ray.training.probe.retention import forgetting, forgetting_whole

    alone = adapter is None or is_whole(adapter)
    if adapter is None and config.retention_data is not None:
        raise UserError("--set retention_data: tells what a training made a base model forget; give no --base-model")
    memory = telling_of_gpu_memory("; take a smaller one: --set per_device_eval_batch_size=N")
    with memory, waiting(f"reading the data and loading the base model {config.model_name_or_path}") as told_of:
        model, loaded, told = load_adapted(None if alone else adapter, config)
        config = config.model_copy(update={"label_names": loaded.label_names, "format": loaded.format})
        told_of.now(f"measuring {len(loaded.validation)} rows")
        metrics = evaluate(model, loaded.validation, config, loaded.tokenizer)
        told_of.now(f"answering {examples} rows")
        predictions = predict(model, loaded, config, examples) if examples else []
        if config.retention_data is not None:
            told_of.now(f"reading {config.retention_data} with what was trained and without it")
            forgotten = forgetting if base is None else forgetting_whole
            metrics |= forgotten(model, base or config, loaded.tokenizer)
    return _Measured(metrics, len(loaded.validation), [_told(one) for one in predictions], told)


def _told(prediction: Prediction) -> dict[str, Any]:
    return {key: told for key, told in asdict(prediction).items() if told is not None}


def _check_here(
    config: TrialConfig, keys: Sequence[str] = ("model_name_or_path", "train_data", "validation_data")
) -> None:
    """UserError if what an export names from the current folder is not in it."""
    for key in keys:
        name = str(getattr(config, key))
        if name.startswith("./") and not any(path.exists() for path in files_of(Path(name))):
            where = "is not in the current folder, from which an export names it"
            mend = " or --data FILE" if key == "train_data" else ""
            raise UserError(f"{key}: {name} {where}; give --set {key}=PATH{mend}")


def _rows(config: TrialConfig) -> str:
    if config.validation_data is None and config.validation_split is None:
        return f"{config.train_data}, held out of training"
    split = f", split {config.validation_split}" if config.validation_split else ""
    return f"{config.validation_data or config.train_data}{split}"
