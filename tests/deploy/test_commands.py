"""Every `bilora-ray` and `ray` command line in deploy/ is one that the real command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

Parse = Callable[[list[str]], dict[str, Any]]

PROGRAMS = ("bilora-ray", "ray")
SPAN = re.compile(r"`((?:bilora-ray|ray) [^`\s]+\s[^`]+)`")
FENCE = re.compile(r"^ *```bash\n(.*?)^ *```", re.M | re.S)


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of PROGRAMS in shell text, with their arguments, also those quoted for another shell."""
    for line in text.replace("\\\n", " ").splitlines():
        # Expansions have a value that an option of any type takes; those of whole lists are left out.
        line = re.sub(r'"\$(\{\w+\[@\]\}|@)"', "", line)
        line = re.sub(r"\$\{?\w+\}?", "1", line)
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
            yield from _commands(token)
        if set(token) <= set("();<>|&") or token in ("--", "then", "{", "!"):
            starts.add(place + 1)
        elif token in PROGRAMS and place in starts:
            end = next((at for at in range(place, len(tokens)) if set(tokens[at]) & set("();<>|&")), len(tokens))
            # The bare name is also that of a cluster and of a security group.
            if end > place + 1:
                yield tokens[place:end]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def commands_in(path: Path) -> list[list[str]]:
    """The commands in a file of deploy/."""
    text = path.read_text()
    if path.suffix == ".md":
        texts = FENCE.findall(text) + [span.replace("\n", " ") for span in SPAN.findall(FENCE.sub("", text))]
    elif path.suffix == ".yaml":
        texts = [string for document in yaml.safe_load_all(text) for string in _strings(document)]
    else:
        texts = [text]
    return [command for text in texts for command in _commands(text)]


def _all(deploy: Path) -> list[tuple[str, list[str]]]:
    files = [path for path in sorted(deploy.rglob("*")) if path.suffix in (".md", ".yaml", ".sh")]
    return [(path.name, command) for path in files for command in commands_in(path)]


def test_every_command_line_is_understood(deploy: Path, parse: Parse) -> None:
    found = _all(deploy)
    for file, command in found:
        try:
            parse(command)
        except click.UsageError as error:
            pytest.fail(f"{file}: {shlex.join(command)}: {error.format_message()}")
    seen = {(file, *command[:2]) for file, command in found}
    assert seen >= {
        ("rayjob.yaml", "bilora-ray", "tune"),
        ("ray-cluster.yaml", "ray", "start"),
        ("slurm.sh", "bilora-ray", "tune"),
        ("slurm.sh", "bilora-ray", "validate"),
        ("slurm.sh", "ray", "start"),
        ("README.md", "bilora-ray", "tune"),
        ("README.md", "bilora-ray", "show"),
        ("README.md", "bilora-ray", "ui"),
        ("README.md", "ray", "up"),
        ("README.md", "ray", "exec"),
        ("README.md", "ray", "job"),
        ("README.md", "ray", "down"),
    }


def test_no_command_is_overlooked(deploy: Path) -> None:
    """The reader above finds as many `bilora-ray tune --` as a plain search does."""
    for path in (deploy / "README.md", deploy / "slurm.sh", deploy / "kubernetes" / "rayjob.yaml"):
        plain = len(re.findall(r"bilora-ray tune --", path.read_text()))
        assert sum(command[:2] == ["bilora-ray", "tune"] for command in commands_in(path)) == plain > 0


def test_a_wrong_option_is_not_understood(parse: Parse) -> None:
    with pytest.raises(click.UsageError, match="--storage"):
        parse(["bilora-ray", "tune", "--space", "s.yaml", "--storage", "x"])
    *_, command = _commands(
        "kubectl exec pod -- ray job submit -- \\\n bilora-ray tune --no-such-option 'a b' | tee log"
    )
    with pytest.raises(click.UsageError, match="--no-such-option"):
        parse(command)


def test_searches_on_clusters_share_their_storage_and_say_how_wide_they_are(deploy: Path, parse: Parse) -> None:
    for file, command in _all(deploy):
        if command[:2] != ["bilora-ray", "tune"] or "slurm" in file:
            continue
        options = parse(command)
        if options["ray_address"]:
            assert (options["ray_address"], str(options["storage_path"])) == ("auto", "/shared/runs"), file
            assert options["max_concurrent"] == 8, file
