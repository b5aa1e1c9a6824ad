"""`bilora-ray export`: a trial's adapter as PEFT, vLLM and the Hub take it."""

from __future__ import annotations

from pathlib import Path

import click

from bilora_ray.cli.options import (
    absolute,
    json_option,
    print_json,
    storage_option,
    study_argument,
    study_database_option,
    telling_of_gpu_memory,
    trial_option,
)
from bilora_ray.cli.waiting import waiting
from bilora_ray.errors import UserError
from bilora_ray.library.exporting import check_new, choose, write
from bilora_ray.recipe import was_trained_whole
from bilora_ray.search.study.layout import Layout
from bilora_ray.threads import use_fitting_threads

EPILOG = """\b
Examples:
  bilora-ray export quickstart --output my-adapter
  bilora-ray export quickstart --trial 3 --output merged-model --merge
  bilora-ray export quickstart --prefer train_runtime --output my-adapter
  bilora-ray export quickstart --output my-adapter --push-to-hub me/my-adapter --private

\b
For llama.cpp, with its own scripts:
  python convert_lora_to_gguf.py --base BASE_FOLDER my-adapter
  python convert_hf_to_gguf.py merged-model
"""


@click.command(epilog=EPILOG)
@study_argument
@trial_option
@click.option(
    "--prefer",
    metavar="METRIC",
    help="Of several objectives the one by which the trial is the best of the front.  [default: the first]",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="A new folder.")
@click.option("--merge", is_flag=True, help="Write the base model with the adapter merged in, and its tokenizer.")
@click.option("--no-check", is_flag=True, help="Do not load the copy and compare: where the base model is too large.")
@click.option(
    "--push-to-hub", "repository", metavar="REPO", help="Upload it to this repository of the Hugging Face Hub."
)
@click.option("--private", is_flag=True, help="With --push-to-hub: a new repository is for its owner only.")
@storage_option
@study_database_option
@json_option
def command(
    study: str,
    number: int | None,
    prefer: str | None,
    output: Path,
    merge: bool,
    no_check: bool,
    repository: str | None,
    private: bool,
    storage_path: Path,
    study_database: str | None,
    as_json: bool,
) -> None:
    """Copy out the adapter of the best trial, or of any: an ordinary PEFT LoRA adapter.

    Of a trial by method full it is the model, as transformers takes it.

    Of a study with finalists it is the winner's: of its runs the one with the middle score, which the reported one is
    of.

    The copy is loaded once and computes what the trained adapter does, to the last bit; a merged model, within
    rounding. What vLLM, SGLang or llama.cpp would refuse is told. No path of this machine is in it: a base model or
    data of a folder is named from the current folder.
    """
    if merge and no_check:
        raise UserError("--no-check: to merge is to load and compare; leave one out")
    if private and repository is None:
        raise UserError("--private: says how a repository is made; give --push-to-hub too")
    layout = Layout(absolute(storage_path), study_database)
    chosen = choose(layout, study, number, prefer)
    check_new(output)
    if repository is not None:
        from bilora_ray.release.hub import check_push, fetch_card

        check_push(repository)
        fetch_card(chosen.adapter)
    without = "" if merge else ", or give --no-check"
    memory = telling_of_gpu_memory(f"; hide it with CUDA_VISIBLE_DEVICES= to use main memory{without}")
    with memory, waiting(f"{'merging' if merge else 'copying'} the adapter, and comparing what was written"):
        if merge or not no_check:
            from bilora_ray.quiet import quiet

            quiet()
            use_fitting_threads()
        exported = write(chosen, output, merge, check=not no_check)
    address = None
    if repository is not None:
        from bilora_ray.release.hub import push

        address = push(exported.output, repository, private)
    if as_json:
        more = {"notes": exported.notes, "serve": exported.serve, "repository": address}
        known = {key: value for key, value in more.items() if value}
        print_json({"output": str(exported.output), "merged": merge, **exported.origin, **known})
        return
    for note in exported.notes:
        click.secho(f"Note: {note}", fg="yellow", err=True)
    which = f"trial {chosen.record.number}"
    if chosen.study != study:
        which += f" of '{chosen.study}'"
    what = "Merged model" if merge else "Model" if was_trained_whole(exported.output) else "Adapter"
    click.echo(f"{what} of {which} is in {output}")
    by = prefer or chosen.objectives[0]
    if number is None and (others := [metric for metric in chosen.objectives if metric != by]):
        click.echo(f"It is the best by {by}; --prefer {others[0]} or --trial N takes another of the front")
    if address is not None:
        click.echo(f"It is at {address}")
    for server, line in exported.serve.items():
        click.echo(f"{server:<8} {line}")
