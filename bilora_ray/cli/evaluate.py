"""`bilora-ray evaluate`: what an exported adapter is worth on data of your choice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bilora_ray.cli.options import json_option, print_json, set_option, telling_of_gpu_memory
from bilora_ray.cli.tables import in_quotes
from bilora_ray.config import TRAINING_SETTINGS, TrialConfig, deciding_the_split
from bilora_ray.digests import check_rows, check_template
from bilora_ray.errors import UserError
from bilora_ray.paths import have_home, locate_here
from bilora_ray.search.space_file import absolute_sources, parse_override

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
    from bilora_ray.recipe import evaluation_config, is_merged, known_of

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
    config = evaluation_config(adapter, settings, base_model)
    before = known_of(adapter)["digests"]
    for key in given:
        # A file that was moved is known by its content.
        if key in deciding_the_split(config.model_dump()) and not (key == "train_data" and key in before):
            raise UserError(
                f"--set {given[key]}: would measure on rows that the training did not hold out; give --data"
            )

    have_home()
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.training.evaluate import evaluate, load_adapted, predict
    from bilora_ray.training.rows import read_sources

    own_rows = data is None and "validation_data" not in given
    notes = list(check_template(config, before))
    if before and (own_rows or data is not None):
        now = {setting: source.digest for setting, source in read_sources(config).items()}
        notes += check_rows(config, before, now) if own_rows else ()
        if data is not None and not base_model and now["train_data"] == before.get("train_data"):
            notes.append(f"--data: {data} is what was trained on, so that this says nothing of other rows")
    with telling_of_gpu_memory("; take a smaller one: --set per_device_eval_batch_size=N"):
        model, loaded, told = load_adapted(None if base_model or is_merged(adapter) else adapter, config)
        config = config.model_copy(update={"label_names": loaded.label_names, "format": loaded.format})
        metrics: dict[str, Any] = evaluate(model, loaded.validation, config, loaded.tokenizer)
        predictions = predict(model, loaded, config, examples) if examples else []
    notes += told
    if as_json:
        said = {"notes": notes} if notes else {}
        shown = {"examples": [asdict(prediction) for prediction in predictions]} if examples else {}
        print_json(metrics | said | shown)
    else:
        for note in notes:
            click.secho(f"Note: {note}", fg="yellow", err=True)
        what = f"base model {config.model_name_or_path}" if base_model else str(adapter)
        click.echo(f"{what} on {len(loaded.validation)} rows of {_rows(config)}:")
        for key, value in metrics.items():
            click.echo(f"{key:<28} {value:.6g}")
        for prediction in predictions:
            click.echo()
            for key, text in asdict(prediction).items():
                click.echo(f"{key:<10} {in_quotes(text)}")


def _rows(config: TrialConfig) -> str:
    if config.validation_data is None and config.validation_split is None:
        return f"{config.train_data}, held out of training"
    split = f", split {config.validation_split}" if config.validation_split else ""
    return f"{config.validation_data or config.train_data}{split}"
