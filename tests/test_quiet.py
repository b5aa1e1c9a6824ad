"""What the libraries beneath print is silenced, whichever of them are imported already."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IMPORT, QUIET = "import datasets", "from bilora_ray.quiet import quiet; quiet()"
PROGRAM = "{}; {}; print(datasets.are_progress_bars_disabled())"


@pytest.mark.parametrize("order", [(IMPORT, QUIET), (QUIET, IMPORT)], ids=["imported before", "imported later"])
def test_datasets_show_no_progress(order: tuple[str, str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HF_DATASETS_DISABLE_PROGRESS_BARS"}
    command = [sys.executable, "-c", PROGRAM.format(*order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
