"""`bilora-ray`: finds the command, imports it, and turns a user's error into one line and exit code 2."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from bilora_ray import __version__
from bilora_ray.errors import UserError, first_line, nearest
from bilora_ray.garbage import seldom_collected
from bilora_ray.interruption import heeding_signals, leaving

# Verb -> its line in `bilora-ray --help`. The module of a verb is imported only when it is called.
COMMANDS = {
    "init": "Look at a data file, and write a space file for it.",
    "validate": "Check a space file in a moment, before anything is computed.",
    "tune": "Search a space file for the best adapter.",
    "compare": "Compare methods, each tuned alike, on fresh seeds and a test set.",
    "submit": "Run a search as a job of a Ray cluster.",
    "train": "Train one adapter, without a search.",
    "profile": "Say where the time and the memory of a trial go, by some of its steps.",
    "show": "Show a study: its trials, the best settings, what mattered.",
    "report": "Write a page of what a study found, to look at.",
    "enqueue": "Name the settings of a study's next trial, while it runs or before.",
    "stop": "Stop a search that runs elsewhere, or one trial of it.",
    "clone": "Write a study down as a space file for another one.",
    "delete": "Remove a study: its files, its records and its runs in MLflow.",
    "export": "Copy a trial's adapter out, or merge it into its base model.",
    "evaluate": "Measure an exported adapter on a data file.",
    "sharpness": "Measure how flat the loss is around an adapter.",
    "predict": "Ask an adapter: a prompt, or every row of a file.",
    "register": "Make an adapter a version of a model in MLflow's registry.",
    "ui": "Browse all runs in MLflow.",
    "estimate": "Say what a search will take: memory, time, device-hours.",
    "doctor": "Look whether all is there that a search needs.",
    "settings": "List every key of a space file, with its default.",
}

# Packages that a file or a folder of a user's own is apt to be called like.
PACKAGES = (
    "accelerate",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "mlflow",
    "numpy",
    "optuna",
    "pandas",
    "peft",
    "pyarrow",
    "ray",
    "safetensors",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
)

# Python would look through all objects once more, for a second, before the system frees them at once.
atexit.register(gc.freeze)

EPILOG = """\b
Start here:
  bilora-ray tune --space quickstart

\b
Shell completion (bash; zsh and fish alike):
  eval "$(_BILORA_RAY_COMPLETE=bash_source bilora-ray)"
"""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of a user's day."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command `cmd_name`, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"bilora_ray.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was typed. UserError with the nearest one if there is none of that name."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise UserError(f"no command '{args[0]}'; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options before the verb."""
        with _one_line(), leaving():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        """Read a command's options and run it."""
        with heeding_signals(), _one_line(), leaving(), seldom_collected():
            _check_packages()
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    """A mistake of the user or a fault of the machine in the block becomes its line on stderr and exit code 2."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        see = f" See '{error.ctx.command_path} --help'." if error.ctx else ""
        _refuse(f"{error.format_message()}{see}")
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read what is printed has read enough
            raise
        _refuse(first_line(error))


def _check_packages() -> None:
    """UserError if PYTHONPATH, as that of a Ray job, puts files of the current folder in the place of packages."""
    with suppress(FileNotFoundError):  # the folder has been removed
        here = Path.cwd()
        if str(here) in map(os.path.abspath, sys.path):
            _check_no_package_in(here)


def _check_no_package_in(here: Path) -> None:
    for package in PACKAGES:
        for file in (here / f"{package}.py", here / package / "__init__.py"):
            if file.exists():
                raise UserError(f"{file}: Python takes it for the package {package}, as PYTHONPATH says; rename it")


def _refuse(line: str) -> NoReturn:
    _drop_what_cannot_be_printed()
    click.echo(f"Error: {line}", err=True)
    sys.exit(2)


def _drop_what_cannot_be_printed() -> None:
    """Python would try to print it once more as it ends, and say so in its own words."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bilora-ray")
def main() -> None:
    """Search for LoRA adapters that generalise: Bi-LoRA with Ray, Optuna and MLflow."""
