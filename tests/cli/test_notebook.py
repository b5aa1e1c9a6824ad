"""What a notebook shows of a search: one picture, drawn in its place, and lines beneath it."""

from __future__ import annotations

from typing import Any

import nbformat

CELL = """
from bilora_ray.cli.progress import SearchProgress
from bilora_ray.records import Objective, Status, TrialRecord

with SearchProgress(2, Objective("eval_loss", False), notes=["rho: is odd"]) as progress:
    progress.start([])
    running = TrialRecord(0, Status.RUNNING, {}, {"rank": 8})
    progress.trial_started(running)
    progress.trial_reported(running, {"step": 1.0, "max_steps": 2.0, "eval_loss": 0.5})
    progress.trial_ended(TrialRecord(0, Status.COMPLETE, {}, {"rank": 8}, value=0.25))
"""


def run(cell: str) -> list[Any]:
    """The outputs of a cell, run by a kernel."""
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return notebook.cells[0].outputs


def test_a_search_is_one_picture_and_its_notes() -> None:
    picture, note = run(CELL)
    assert (picture.output_type, note.output_type) == ("display_data", "display_data")
    lines = picture.data["text/plain"].splitlines()
    assert lines[0].startswith("1 of 2 trials done  1 complete, 0 stopped early")
    assert "best so far: eval_loss 0.25 (trial 0)" in lines
    assert picture.data["text/html"].startswith("<pre")
    assert "1 of 2 trials done" in picture.data["text/html"]
    assert "Note: rho: is odd" in note.data["text/plain"]
