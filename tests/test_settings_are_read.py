"""A setting that nobody reads would be shown, searched and stored, and change nothing."""

import ast
from pathlib import Path

from bilora_ray.method import METHODS, settings_of
from bilora_ray.settings import FACTS

PACKAGE = Path(__file__).resolve().parents[1] / "bilora_ray"


def test_every_setting_is_read_somewhere() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {setting for name in METHODS for setting in settings_of(name)}
    # What names the commit of a source is read through its fact.
    read |= {facts.revision for facts in FACTS.values() if facts.revision}
    # A name of what is compared is read with the study's parameters, and decides nothing.
    assert set(FACTS) - read == {"variant"}
