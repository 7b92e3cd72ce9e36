"""examples/digits.ipynb runs from its first cell to its last, draws its figure, and finds what it says."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
PATH = ROOT / "examples" / "digits.ipynb"


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs_and_elle_a_withstands_pgd(monkeypatch, tmp_path):
    notebook = read()
    # This checkout, this interpreter, and nothing of the user's own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    folder = tmp_path / "folder"
    folder.mkdir()
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    assert not list(folder.iterdir())  # it leaves no files behind
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    (figure,) = (output for output in outputs["training"] if output.output_type == "display_data")
    assert len(figure.data["image/png"]) > 10_000  # more than empty axes
    assert not [output for each in outputs.values() for output in each if output.get("name") == "stderr"]
    (result,) = (output for output in outputs["result"] if output.output_type == "execute_result")
    robust = ast.literal_eval(result.data["text/plain"])
    assert robust["ELLE-A"] > robust["FGSM"] + 0.05
