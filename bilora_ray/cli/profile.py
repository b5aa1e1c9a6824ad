"""`bilora-ray profile`: some steps of a trial, and where their time and memory go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.options import json_option, print_json, set_option, space_option
from bilora_ray.cli.waiting import waiting
from bilora_ray.errors import TrialFailure, UserError
from bilora_ray.paths import have_home
from bilora_ray.search.space import Space, Value
from bilora_ray.search.space_file import load_space
from bilora_ray.words import duration

if TYPE_CHECKING:
    from bilora_ray.training.probe.profile import Profile

EPILOG = """\b
Examples:
  bilora-ray profile --space quickstart
  bilora-ray profile --space llama --set gradient_checkpointing=false --json
"""
MIB, GIB = 2**20, 2**30
VISIBLE = "CUDA_VISIBLE_DEVICES"


@click.command(epilog=EPILOG)
@space_option
@set_option
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, metavar="N", help="Steps that are timed."
)
@json_option
def command(space_path: Path, overrides: tuple[str, ...], steps: int, as_json: bool) -> None:
    """Run some steps and one evaluation of a trial, and say where the time and the memory go.

    It is the trial with the first of the points_to_evaluate, and with the first choice or the low end of what those
    leave open. A worker's part of it is run, in this process, with the share of a GPU that `resources` give it; with
    none it runs on the CPU, as it would in a search. No study is touched.
    """
    space = load_space(space_path, overrides)
    have_home()

    with waiting("reading and checking the data and the model"):
        from bilora_ray.quiet import quiet
        from bilora_ray.search.preflight import pinned, preflight

        space = pinned(space, None)
        preflight(space)
        quiet()
        from bilora_ray.training.probe.profile import WARM_UP, profile

    where = ", on the CPU: resources.gpus_per_worker is 0" if space.resources.gpus_per_worker == 0 else ""
    click.echo(f"Running {WARM_UP} steps to warm up, at least {steps} timed ones, and one evaluation{where}", err=True)
    try:
        with _seeing(space.resources.gpus_per_worker), waiting("loading the base model, then running steps"):
            found = profile(
                space.trial_config(_first(space)),
                steps,
                space.resources.workers,
                space.resources.gpus_per_worker,
                sharded=space.resources.parallelism == "fsdp",
            )
    except TrialFailure as error:
        raise UserError(f"the trial failed: {error}") from None
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)


@contextmanager
def _seeing(gpus: float) -> Iterator[None]:
    """In the block, torch sees a GPU only where a worker has some; it must not have looked for one before."""
    before = os.environ.get(VISIBLE)
    if gpus == 0:
        os.environ[VISIBLE] = ""
    try:
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        os.environ.update({} if before is None else {VISIBLE: before})


def _first(space: Space) -> dict[str, Value]:
    return space.first(space.points_to_evaluate[0] if space.points_to_evaluate else {})


def _print(found: Profile) -> None:
    click.secho(f"{found.device}, {found.precision}", bold=True)
    each = " of a worker" if found.workers > 1 else ""
    padding = f"{found.padding:.0%} of the positions are padding"
    for what, line in (
        (
            "speed",
            f"{found.tokens_per_second:,.0f} tokens/s, {found.positions_per_second:,.0f} positions/s{each}: {padding}",
        ),
        ("step", f"{_time(found.step_seconds)}, of {found.step_rows} rows; forward passes: {found.passes:.3g}"),
        ("trial", f"about {_time(found.trial_seconds)}: {found.trial_steps} steps, {found.evaluations} evaluations"),
        ("start", f"{_time(found.start_seconds)}, before the first step"),
        (
            "arithmetic",
            f"{found.utilisation:.0%} of the {found.device_rate / 1e12:.3g} TFLOP/s of a large product here",
        ),
    ):
        click.echo(f"  {what:<20} {line}")
    click.secho("Time of the trial", bold=True)
    for part, share in sorted(found.shares.items(), key=lambda item: -item[1]):
        click.echo(f"  {part:<20} {share:>6.1%}  {'#' * round(40 * share)}")
    for note in found.notes:
        click.echo(f"  {note}")
    click.secho("Memory", bold=True)
    for kind, size in found.memory.items():
        click.echo(f"  {kind.replace('_', ' '):<20} {_size(size):>10}")
    click.secho("What would gain most, by estimate", bold=True)
    for suggestion in found.suggestions:
        value = {None: "null", True: "true", False: "false"}.get(suggestion.value, suggestion.value)
        click.echo(f"  {suggestion.setting}: {value}  {suggestion.speedup:.2f} x  {suggestion.reason}")
    if not found.suggestions:
        click.echo("  nothing that is known of")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 10 else duration(seconds)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
