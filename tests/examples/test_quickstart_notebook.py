"""The notebook: it holds together, uses what is public, and runs from its first cell to its last."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

import bilora_ray

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code() -> str:
    cells = [cell.source for cell in read().cells if cell.cell_type == "code"]
    return "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))


def test_it_is_valid_holds_no_output_and_compiles() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    compile(code(), NOTEBOOK.name, "exec")


def test_it_uses_public_names_only() -> None:
    used: dict[str, set[str]] = {"bilora_ray": set(), "study": set()}
    for node in ast.walk(ast.parse(code())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in used:
            used[node.value.id].add(node.attr)
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith("bilora_ray.") for name in imported)
    assert used["bilora_ray"] - {"__file__"} <= set(bilora_ray.__all__)
    members = {*vars(bilora_ray.Study), "metric"}
    assert used["study"] <= {name for name in members if not name.startswith("_")}
    assert {"tune"} <= used["bilora_ray"]
    assert {"trials", "history", "best", "export"} <= used["study"]


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    for file in ("examples/quickstart.ipynb", "search_spaces/quickstart.yaml"):
        (tmp_path / file).parent.mkdir()
        shutil.copyfile(ROOT / file, tmp_path / file)
    notebook = read()
    folder = str(tmp_path / "examples")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    searched, table, chart, best, exported, asked = [
        cell.outputs for cell in notebook.cells if cell.cell_type == "code"
    ]
    # The picture is drawn in one place, and ends with the search; there is no line of a library.
    picture = searched[0].data["text/plain"]
    assert picture.startswith("4 of 4 trials done")
    assert "best so far: eval_exact_match" in picture
    assert {output.output_type for output in searched} == {"display_data"}
    told = " ".join(output.data["text/plain"] for output in searched[1:])
    assert not any(word in told.lower() for word in ("ray ", "warning", "deprecat", "optuna", "mlflow"))
    assert "<table" in table[0].data["text/html"]
    assert "image/png" in chart[-1].data
    assert "learning_rate" in best[0].data["text/plain"]
    assert exported == []
    assert "-" in asked[-1].data["text/plain"]  # 39 - 31, as the adapter has learned to write it
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == [
        *("quickstart-adapter", "quickstart.ipynb", "runs")
    ]
