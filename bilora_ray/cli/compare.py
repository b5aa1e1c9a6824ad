"""`bilora-ray compare`: whether one method beats another, each tuned alike."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from bilora_ray.cli.options import (
    absolute,
    insecure_option,
    leaving_to_go_on,
    mlflow_option,
    print_json,
    program,
    storage_option,
    study_database_option,
)
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.cli.waiting import waiting
from bilora_ray.errors import MachineError, UserError, first_line
from bilora_ray.library.asked import Asked
from bilora_ray.library.comparing import Checks, check_comparison, comparison_of, rehearse, run_comparison
from bilora_ray.search.comparing.file import Comparison
from bilora_ray.search.space import setting_of
from bilora_ray.search.space.shipped import comparison_file, comparisons
from bilora_ray.search.study.layout import Layout

if TYPE_CHECKING:
    from bilora_ray.evidence.outcome import Outcome
    from bilora_ray.training.rehearsal import Rehearsal

EPILOG = """\b
Examples:
  bilora-ray compare quickstart
  bilora-ray compare quickstart --resume
  bilora-ray compare quickstart --extend 10
  bilora-ray compare my_comparison.yaml --set comparison.budget=seconds --json outcome.json
  bilora-ray compare my_comparison.yaml --set 'methods.bilora.rho={low: 0.01, high: 0.5, log: true}' --dry-run
"""
STDOUT = "-"


class ComparisonFile(click.ParamType):
    """A comparison file: a path, or the name of one that ships."""

    name = "comparison"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The file. UserError if no shipped comparison has that name."""
        return value if isinstance(value, Path) else comparison_file(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names that begin with `incomplete`, and the shell's own files."""
        names = [CompletionItem(name) for name in comparisons() if name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="file")]


@click.command(epilog=EPILOG)
@click.argument("file", type=ComparisonFile(), metavar="FILE|NAME")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the file: max_steps=100 for all, methods.bilora.rho=0.1, comparison.seeds=5. Repeatable.",
)
@click.option("--resume", is_flag=True, help="Go on with the comparison after an interruption, or tell of it again.")
@click.option(
    "--extend", type=click.IntRange(min=1), metavar="N", help="Go on with the comparison, on N seeds more than it has."
)
@storage_option
@study_database_option
@mlflow_option
@insecure_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the file, the data, the models' shapes and the studies, say what would run, and stop.",
)
@click.option("--ray-address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray cluster.  [default: this machine]")
@click.option("--json", "output", metavar="FILE|-", help="Write the outcome as JSON; -: on stdout, in place of tables.")
def command(
    file: Path,
    overrides: tuple[str, ...],
    resume: bool,
    extend: int | None,
    storage_path: Path,
    study_database: str | None,
    mlflow_uri: str | None,
    insecure: bool,
    dry_run: bool,
    ray_address: str | None,
    output: str | None,
) -> None:
    """Compare methods at equal budgets, as FILE says, or the comparison of a NAME that ships.

    Each entry is tuned with as many trials over its own space, chosen on the validation rows, trained anew on fresh
    seeds and scored once on test rows that chose nothing. What it gains over the baseline is told with its interval,
    and that nothing is known where that is so. It may be interrupted at any moment: --resume finishes it.
    """
    if output not in (None, STDOUT) and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UserError(f"--json {output}: must be a file in a folder that exists, or -")
    layout = Layout(absolute(storage_path), study_database)
    asked = Asked(
        layout=layout,
        resume=resume,
        extend=extend,
        ray_address=ray_address,
        mlflow_uri=mlflow_uri,
        insecure=insecure,
        dry_run=dry_run,
    )
    comparison = comparison_of(file, overrides, asked)
    with waiting("reading and checking the data and the models"):
        checks = check_comparison(comparison, asked)
    if dry_run:
        with waiting("trying what can be tried without weights"):
            rehearsal = rehearse(checks)
        _print_plan(checks, rehearsal)
        return
    with waiting("loading what a comparison needs"):
        import bilora_ray.search.comparing.run  # noqa: F401 - what it takes is seconds
    with leaving_to_go_on():
        say = partial(click.secho, fg="yellow", err=True)
        outcome = run_comparison(checks, partial(SearchProgress, starting="opening MLflow"), say)
    _tell(outcome, comparison, storage_path, output)


def _print_plan(checks: Checks, rehearsal: Rehearsal) -> None:
    comparison, config = checks.comparison, checks.comparison.config
    more = checks.asked.extend
    if more is None:
        click.echo(f"Comparison '{comparison.name}' would tune, with {config.tune} trials each,")
    else:
        added = f"{more} seeds more than its {checks.seeds}, each with its best settings:"
        click.echo(f"Comparison '{comparison.name}' has tuned, and would train on {added}")
    spaces = comparison.spaces
    if more is not None:  # an entry of which no trial is complete has no runs
        spaces = {entry: spaces[entry] for entry in checks.entries}
    for entry, space in spaces.items():
        baseline = ", the baseline" if entry == comparison.baseline else ""
        click.echo(f"  {entry} ({space.fixed['method']}{baseline}){' over' if more is None else ''}")
        for name, part in space.parts.items() if more is None else ():
            click.echo(f"    {setting_of(name):<26} {part}")
    count = len(spaces)
    if more is None:
        click.echo(f"then train each on {config.seeds} fresh seeds and score it once, at equal {config.budget}")
        click.echo(f"({_length(comparison)}): {config.tune * count} + {config.seeds * count} trainings.")
    else:
        click.echo(f"at equal {config.budget} ({_length(comparison)}): {more * count} trainings.")
    for split, rows in rehearsal.rows.items():
        click.echo(f"{split} rows: {rows.rows}")
    if checks.checked.test_rows is not None:
        click.echo(f"test rows: {checks.checked.test_rows}")
    for line in dict.fromkeys((*comparison.notes, *checks.checked.notes, *rehearsal.notes)):
        click.secho(f"Note: {line}", fg="yellow")
    click.echo("Nothing was started.")


def _length(comparison: Comparison) -> str:
    """How long a training is, in words."""
    config = comparison.spaces[comparison.baseline].first_config()
    steps = f"{config.num_train_epochs:g} epochs" if config.max_steps is None else f"{config.max_steps} steps"
    return steps if comparison.config.budget == "steps" else f"{steps} of {comparison.baseline}, the others as long"


def _tell(outcome: Outcome, comparison: Comparison, storage_path: Path, output: str | None) -> None:
    from bilora_ray.evidence.outcome import as_json

    if output == STDOUT:
        print_json(as_json(outcome))
        return
    print_outcome(outcome)
    _print_next(comparison, storage_path)
    if output is not None:  # after what a full disk must not hide
        _write(outcome, Path(output))


def _write(outcome: Outcome, output: Path) -> None:
    from bilora_ray.files import atomic_file
    from bilora_ray.search.comparing.told import as_text

    try:
        with atomic_file(output) as file:
            file.write(as_text(outcome))
    except OSError as error:
        raise MachineError(f"--json {output}: cannot be written ({error.strerror or first_line(error)})") from None


def print_outcome(outcome: Outcome) -> None:
    """Print the table of a comparison, what it says in words, and what there is to know before it is believed."""
    from rich.console import Console

    from bilora_ray.cli.tables import TrialTable
    from bilora_ray.evidence.outcome import COLUMNS, as_table, notes, sentences
    from bilora_ray.evidence.statistics import METHOD

    console = Console(highlight=False)
    count = len(outcome.seeds)
    title = f"\nComparison '{outcome.name}': {outcome.metric} on {count} fresh seeds each, equal {outcome.budget}"
    console.print(title, style="bold", markup=False)
    columns, rows = as_table(outcome)
    # What is compared, and what else there is to know: a terminal has no room for both.
    measured = [place for place, column in enumerate(columns) if column in COLUMNS]
    compared = [place for place in range(len(columns)) if place not in measured]
    for places, with_settings in ((compared, False), ([0, *measured], True)):
        table = TrialTable(*(columns[place] for place in places))
        for cells, settings in rows:
            table.add(*(cells[place] for place in places), sampled=settings if with_settings else {})
        console.print(table)
    for line in sentences(outcome):
        console.print(line, style="bold", markup=False, soft_wrap=True)
    for line in notes(outcome):
        console.print(f"Note: {line}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"{METHOD[0].upper()}{METHOD[1:]}.", style="dim", markup=False, soft_wrap=True)


def _print_next(comparison: Comparison, storage_path: Path) -> None:
    from bilora_ray.search.comparing.told import FOLDER

    command = shlex.join(program())
    runs = "" if storage_path == Path("runs") else f" --storage-path {shlex.quote(str(storage_path))}"
    folder = Layout(absolute(storage_path)).study(comparison.runs) / FOLDER
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    click.echo(f"{'Kept':<8} {folder}")
    click.echo(f"{'Runs':<8} {command} show {comparison.runs}{runs}")
    click.echo(f"{'Browse':<8} {command} ui{runs}")
