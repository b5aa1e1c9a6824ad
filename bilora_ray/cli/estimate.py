"""`bilora-ray estimate`: what a search will take, before it is begun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.options import json_option, print_json, set_option, space_option
from bilora_ray.cli.waiting import waiting
from bilora_ray.library.spaces import space_to_search
from bilora_ray.paths import have_home
from bilora_ray.words import duration

if TYPE_CHECKING:
    from bilora_ray.search.readiness.estimate import Estimate, Interval

EPILOG = """\b
Examples:
  bilora-ray estimate --space quickstart
  bilora-ray estimate --space llama --num-trials 40 --ray-address auto --json
"""
GIB = 2**30


@click.command(epilog=EPILOG)
@space_option
@set_option
@click.option("--num-trials", type=click.IntRange(min=1), metavar="N", help="Trials.  [default: the space file's]")
@click.option("--max-concurrent", type=click.IntRange(min=1), metavar="N", help="Trials at one time.")
@click.option("--ray-address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray cluster.  [default: this machine]")
@json_option
def command(
    space_path: Path,
    overrides: tuple[str, ...],
    num_trials: int | None,
    max_concurrent: int | None,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Run some steps of the extreme trials of a space, and say what its search will take.

    Memory, the time of a trial, device-hours and cost of the study with its early stops, each with where eight of ten
    searches would lie. A space with trials that do not fit is refused. No study is touched.
    """
    space = space_to_search(space_path, overrides, num_trials, max_concurrent)
    have_home()

    with waiting("reading and checking the data and the model"):
        from bilora_ray.quiet import quiet
        from bilora_ray.search.preflight import check_kernels, pinned, preflight

        space = pinned(space, None)
        preflight(space)

        from bilora_ray.search.cluster.cluster import is_own
        from bilora_ray.search.readiness.estimate import ends
        from bilora_ray.search.readiness.measure import measure

        if is_own(ray_address):
            check_kernels(space, apart=True)
        quiet()
    click.echo(f"Running some steps of {len(ends(space))} trials, the extreme ones", err=True)
    with waiting("starting Ray") as told_of:

        def measured(done: int, count: int) -> None:
            if not done:
                told_of.now("measuring trials, each in a process of its own")
            told_of.counted(done, count)

        found = measure(space, ray_address, measured)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)


def _print(found: Estimate) -> None:
    click.secho(f"Study '{found.study}': {found.num_trials} trials, {found.at_once} at one time", bold=True)
    low, high = (size / GIB for size in found.memory)
    lines = [
        ("memory", f"{low:.2f} to {high:.2f} GiB a worker, of {found.room / GIB:.1f} GiB that it could have"),
        ("adapter", f"{found.adapter / 2**20:.1f} MiB at the most"),
        ("trial", f"{_in_words(found.trial_seconds)}, to its end"),
        ("early stops", f"leave {found.trained.median:.0%} of the training ({_shares(found.trained)})"),
        ("search", _in_words(found.wall_seconds)),
        ("device-hours", _numbers(found.device_hours)),
    ]
    if found.cost is not None:
        lines.append(("cost", _numbers(found.cost)))
    for what, line in lines:
        click.echo(f"  {what:<16} {line}")
    for note in found.notes:
        click.secho(f"Note: {note}", fg="yellow")


def _in_words(found: Interval) -> str:
    return f"{duration(found.median)} ({duration(found.low)} to {duration(found.high)})"


def _numbers(found: Interval) -> str:
    return f"{found.median:.3g} ({found.low:.3g} to {found.high:.3g})"


def _shares(found: Interval) -> str:
    return f"{found.low:.0%} to {found.high:.0%}"
