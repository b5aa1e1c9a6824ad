"""`bilora-ray show`: what a study found."""

from __future__ import annotations

from pathlib import Path

import click

from bilora_ray.cli.leaderboard import STATUS_WORDS, print_leaderboard, print_settings, study_as_json
from bilora_ray.cli.options import (
    absolute,
    json_option,
    optional_study_argument,
    print_json,
    print_next,
    storage_option,
    study_database_option,
)

EPILOG = """\b
Examples:
  bilora-ray show
  bilora-ray show quickstart
  bilora-ray show quickstart --json | jq .best.sampled
"""


@click.command(epilog=EPILOG)
@optional_study_argument
@storage_option
@study_database_option
@json_option
def command(study: str | None, storage_path: Path, study_database: str | None, as_json: bool) -> None:
    """Show a study's trials, its best settings and what mattered; without STUDY, list the studies."""
    from rich.console import Console

    from bilora_ray.search.layout import Layout
    from bilora_ray.search.storage import naming_the_database, study_names
    from bilora_ray.search.studies import load_study

    layout = Layout(absolute(storage_path), study_database)
    if study is None:
        names = study_names(layout)
        if as_json:
            print_json(names)
        else:
            click.echo("\n".join(names) or f"no studies in {storage_path}")
        return
    found = load_study(layout, study)
    if as_json:
        print_json(study_as_json(found))
        return
    console = Console(highlight=False)
    with naming_the_database(layout):
        records = found.records_now()
    counts = {words: sum(record.status is status for record in records) for status, words in STATUS_WORDS.items()}
    summary = ", ".join(f"{count} {words}" for words, count in counts.items() if count) or "no trials"
    console.print(f"Study '{study}': {summary} of {found.space.study.num_trials}", style="bold", markup=False)
    print_leaderboard(console, records, found.metric, found.greater_is_better)
    importances = found.importances()
    if importances:
        console.print(f"What mattered, by the variance of {found.metric} among complete trials:", markup=False)
        print_settings(console, {key: f"{share:.0%}" for key, share in importances.items()})
    elif found.space.distributions:
        console.print("What mattered cannot be told before four trials are complete, with different values.")
    best = found.best()
    if best is not None:
        console.print(f"\nBest: trial {best.number}, {found.metric} {best.value:.6g}", style="bold green", markup=False)
        print_settings(console, best.sampled)
        print_next(study, storage_path, study_database, best.adapter)
