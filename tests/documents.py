"""What a document of the repository holds for its reader to type: commands, space files, Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from bilora_ray.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("bilora-ray", "ray")
SPAN = re.compile(r"`((?:bilora-ray|ray) [^`\s]+\s[^`]+)`")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.M | re.S)


def documents() -> list[Path]:
    """Those that say how to use the package."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown `text` in a `language`."""
    return [block for _, kind, block in FENCE.findall(text) if kind == language]


def commands_in(text: str) -> list[list[str]]:
    """The commands in a Markdown text, of its blocks for a shell and of its prose."""
    prose = FENCE.sub("", text)
    texts = blocks(text, "bash") + [span.replace("\n", " ") for span in SPAN.findall(prose)]
    return [command for one in texts for command in commands_of(one)]


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of PROGRAMS in shell text, with their arguments, also those quoted for another shell."""
    for line in text.replace("\\\n", " ").splitlines():
        # Expansions have a value that an option of any type takes, a space's a file; those of whole lists are left out.
        line = re.sub(r'"\$(\{\w+\[@\]\}|@)"', "", line)
        line = re.sub(r"\$\{?(\w+)\}?", lambda name: "1.yaml" if name[1].lower() == "space" else "1", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a quotation that goes on in the next line: no command of ours does
            assert not re.search(r"(^|[ ('\"])(bilora-ray|ray) [a-z]", line), line
            continue
        yield from _in_tokens(tokens)


def _in_tokens(tokens: list[str]) -> Iterator[list[str]]:
    starts = {0}
    for place, token in enumerate(tokens):
        if any(token.startswith(f"{program} ") for program in PROGRAMS):
            yield from commands_of(token)
        if set(token) <= set("();<>|&") or token in ("--", "then", "{", "!"):
            starts.add(place + 1)
        elif token in PROGRAMS and place in starts:
            end = next((at for at in range(place, len(tokens)) if set(tokens[at]) & set("();<>|&")), len(tokens))
            # The bare name is also that of a cluster and of a security group.
            if end > place + 1:
                yield tokens[place:end]


def options_of(command: list[str]) -> dict[str, Any]:
    """What `bilora-ray` or `ray` itself reads a command line as. UsageError if it would not take it."""
    program: Any = main
    if command[0] == "ray":
        from ray.scripts.scripts import cli as program
    context = click.Context(program, info_name=command[0], **program.context_settings)
    arguments = command[1:]
    while isinstance(program, click.Group):
        name, program, arguments = program.resolve_command(context, arguments)
        context = click.Context(program, parent=context, info_name=name)
    assert program is not None
    return program.make_context(command[1], arguments, parent=context).params
