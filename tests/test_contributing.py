"""CONTRIBUTING's tree of the package names every file, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOM, FILE = re.compile(r"[a-z_]+/"), re.compile(r"[a-z0-9_]+\.py")


def test_the_tree_names_every_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("    bilora_ray/\n")[2].partition("    examples/")[0]
    rooms: list[str] = []
    named: list[str] = []
    for line in block.splitlines():
        words = line.split()
        depth = (len(line) - len(line.lstrip())) // 2 - 3
        if ROOM.fullmatch(words[0]):
            rooms[depth:] = [words[0]]
        else:
            named += ["".join(rooms[:depth]) + word for word in words if FILE.fullmatch(word)]
    package = ROOT / "bilora_ray"
    there = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.name.startswith("__")]
    assert sorted(named) == sorted(there)


def test_no_line_is_wider_than_an_editor() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 140] == []
