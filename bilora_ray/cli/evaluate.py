"""`bilora-ray evaluate`: what an exported adapter is worth on data of your choice."""

from __future__ import annotations

from pathlib import Path

import click

from bilora_ray.cli.options import json_option, print_json, set_option

EPILOG = """\b
Examples:
  bilora-ray evaluate my-adapter
  bilora-ray evaluate my-adapter --data test.jsonl --json
  bilora-ray evaluate my-adapter --data test.jsonl --base-model
"""


@click.command(epilog=EPILOG)
@click.argument("adapter", type=click.Path(path_type=Path), metavar="ADAPTER")
@click.option("--data", metavar="FILE", help="Data to measure on.  [default: the validation rows of its training]")
@click.option("--base-model", is_flag=True, help="Measure the base model without the adapter, to compare with.")
@set_option
@json_option
def command(adapter: Path, data: str | None, base_model: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure the adapter in folder ADAPTER with the metrics that it was trained with."""
    from bilora_ray.training.export import evaluation_config

    config = evaluation_config(adapter, data, overrides)

    from bilora_ray.training.evaluate import evaluate_adapter
    from bilora_ray.training.quiet import quiet

    quiet()
    metrics = evaluate_adapter(None if base_model else adapter, config)
    if as_json:
        print_json(metrics)
    else:
        for key, value in metrics.items():
            click.echo(f"{key:<28} {value:.6g}")
