"""Where the outcome of a comparison cannot go is said before it begins, and not after hours."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bilora_ray.cli.main import main


@pytest.mark.parametrize("output", ["", "absent/outcome.json"])
def test_a_place_where_nothing_can_be_written_is_refused_at_once(output: str, tmp_path: Path) -> None:
    asked = ["compare", "quickstart", "--dry-run", "--json", str(tmp_path / output), "--storage-path", str(tmp_path)]
    found = CliRunner().invoke(main, asked)
    assert found.exit_code == 2
    assert "must be a file in a folder that exists, or -" in found.output
