"""`bilora-ray sharpness`: how flat the loss is around an exported adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bilora_ray.cli.evaluate import asked, on_rows
from bilora_ray.cli.options import json_option, print_json, set_option, telling_of_gpu_memory
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError, first_line
from bilora_ray.facts import STARTING
from bilora_ray.files import atomic_file

if TYPE_CHECKING:
    from bilora_ray.training.probe.sharpness import Flatness

EPILOG = """\b
Examples:
  bilora-ray sharpness my-adapter
  bilora-ray sharpness my-adapter --data test.jsonl --radii 0.05,0.1,0.2 --output sharpness.png
  bilora-ray sharpness my-adapter --data train.jsonl --m 16
  bilora-ray sharpness my-adapter --base-model --json
  bilora-ray sharpness my-adapter --set max_eval_samples=200
"""
SUFFIX = ".png"
SPACES = {"full_space": "Full space: all adapted weights W", "lora_space": "LoRA space: the factors A and B"}


@click.command(epilog=EPILOG)
@click.argument("adapter", type=click.Path(path_type=Path), metavar="ADAPTER")
@click.option("--data", metavar="FILE", help="Data to measure on.  [default: the validation rows of its training]")
@click.option(
    "--radii",
    default="0.05,0.1,0.2,0.5,1",
    show_default=True,
    metavar="LIST",
    help="Norms of a step along the gradient; of one along a random direction, shares of the weights.",
)
@click.option(
    "--m",
    type=click.IntRange(min=1),
    metavar="ROWS",
    help="Rows of each batch of m-sharpness.  [default: those of a step of its training]",
)
@click.option("--base-model", is_flag=True, help="Measure the base model alone, to compare with.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="A .png file for a picture.")
@set_option
@json_option
def command(
    adapter: Path,
    data: str | None,
    radii: str,
    m: int | None,
    base_model: bool,
    output: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure how the loss rises around the adapter in folder ADAPTER, or around a merged model.

    The weights that it adapts are moved, in memory only, by a step of each of the --radii: along the gradient over all
    rows; along each batch's own gradient, for that batch, which is m-sharpness; and along random directions, with
    rows as long as those of the weights. With the top eigenvalue of the Hessian, in the full space of the weights and,
    of an adapter, in the space of its factors. It takes as long as some hundreds of evaluations, and main memory for
    three times the adapted weights in fp32. No file and no weight is changed.
    """
    steps = _radii(radii)
    if output is not None and (output.suffix != SUFFIX or not output.absolute().parent.is_dir()):
        raise UserError(f"--output {output}: must be a {SUFFIX} file in a folder that exists")
    config, notes = asked(adapter, data, overrides, base_model)
    m = m or config.step_rows(1)
    with telling_of_gpu_memory():
        found, loss, rows, told = _measured(adapter, config, steps, m, base_model)
    notes += told
    what = on_rows(adapter, config, rows, base_model)
    if output is not None:
        _draw(output, found, steps, what)
    if as_json:
        said = {"notes": notes} if notes else {}
        print_json({"eval_loss": loss, "rows": rows, "radii": steps, "m": m, **_as_json(found), **said})
        return
    for note in notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
    click.echo(f"{what}: eval_loss {loss:.6g}, and its rise when the weights move")
    for space, measured in found.items():
        click.echo()
        _print(SPACES[space], measured, steps)
    if output is not None:
        click.echo(f"\nPicture  {output}")


def _radii(text: str) -> list[float]:
    """The numbers of a list. UserError unless each is one, above 0."""
    found = []
    for part in text.split(","):
        try:
            radius = float(part)
        except ValueError:
            radius = math.nan
        if not 0 < radius < math.inf:
            raise UserError(f"--radii {text}: must be numbers above 0 with commas between, got '{part.strip()}'")
        found.append(radius)
    return sorted(set(found))


def _measured(
    adapter: Path, config: TrialConfig, radii: Sequence[float], m: int, base_model: bool
) -> tuple[dict[str, Flatness], float, int, list[str]]:
    """By space what was found; the loss at rest, of how many rows; and lines about them."""
    from bilora_ray.method import fuse
    from bilora_ray.quiet import quiet
    from bilora_ray.recipe import is_whole
    from bilora_ray.training.compute.varlen import needs_no_padding
    from bilora_ray.training.evaluate import load_adapted
    from bilora_ray.training.model import add_primary
    from bilora_ray.training.probe.sharpness import SPACES, Rows, survey

    quiet()
    if needs_no_padding(config.attn_implementation or ""):  # such a kernel can be derived once only
        config = config.model_copy(update={"attn_implementation": None})
    alone = base_model or is_whole(adapter)
    model, loaded, told = load_adapted(None if alone else adapter, config)
    if alone:  # an adapter that does nothing says which weights are looked at
        model = fuse(add_primary(model, config, fresh=()))
    config = config.model_copy(update={"label_names": loaded.label_names, "format": loaded.format})
    rows = Rows(model, loaded.validation, config, loaded.tokenizer)
    unknown = None if alone else _of_no_lora_space(config.primary)
    spaces = {name: kind for name, kind in SPACES.items() if not ((alone or unknown) and name == "lora_space")}
    with _progress(len(spaces)) as telling:
        found = {name: survey(rows, radii, kind, m, telling) for name, kind in spaces.items()}
    if unknown is not None:
        told = [*told, unknown]
    if str(model.dtype) == "torch.bfloat16":
        told = [*told, "bf16 rounds: --set precision=fp32 is finer where rises are below a thousandth of the loss"]
    return found, rows.loss(), len(loaded.validation), told


def _of_no_lora_space(primary: str) -> str | None:
    """Why the space of the factors is not looked at; None: it is."""
    if primary == "dora":
        return "primary: the weight of a dora is no sum of W0 and its factors, so that the LoRA space is left out"
    if primary in STARTING:
        return f"primary: {primary} was not trained in the factors that it is exported by: the LoRA space is left out"
    return None


@contextmanager
def _progress(spaces: int) -> Iterator[Callable[[str], None]]:
    """What tells on a terminal what is measured now, and in a log when each part begins."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    begun, each = 0, 4
    with console.status("") as status:

        def telling(what: str) -> None:
            nonlocal begun
            begun += 1
            line = f"Measuring, {begun} of {each * spaces}: {what}"
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        yield telling


def _print(title: str, found: Flatness, radii: Sequence[float]) -> None:
    random = found.random
    halves = [high - mean for mean, high in zip(random.mean, random.high, strict=True)]
    rows = {
        "radius": [f"{radius:g}" for radius in radii],
        "along the gradient": [f"{rise:.4g}" for rise in found.adversarial],
        "each batch along its own": [f"{rise:.4g}" for rise in found.m_sharpness],
        "random directions": [f"{rise:.4g}" for rise in random.mean],
        "  +-": [f"{half:.2g}" for half in halves],
    }
    click.echo(title)
    for name, cells in rows.items():
        click.echo(f"  {name:<26}" + "".join(f"{cell:>11}" for cell in cells))
    top = found.top_eigenvalue
    click.echo(f"  {'top eigenvalue':<26}{top.value:>11.4g}  +- {top.error:.2g}")


def _as_json(found: Mapping[str, Flatness]) -> dict[str, object]:
    def told(measured: Flatness) -> dict[str, object]:
        value, error, products = measured.top_eigenvalue
        return {**asdict(measured), "top_eigenvalue": {"value": value, "error": error, "products": products}}

    return {space: told(measured) for space, measured in found.items()}


def _draw(output: Path, found: Mapping[str, Flatness], radii: Sequence[float], title: str) -> None:
    from bilora_ray.report.sharpness import picture

    drawn = picture(found, radii, title)
    try:
        with atomic_file(output) as file:
            file.buffer.write(drawn)
    except OSError as error:
        raise MachineError(f"--output {output}: cannot be written ({error.strerror or first_line(error)})") from None
