"""docs/notebook.ipynb runs from its first cell to its last, and prints what it shows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import fq
import fq_kernels

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"


def printed(notebook) -> list[list[str]]:
    """The words of each cell that prints; a table's blanks are pandas' own."""
    cells = [
        "".join(
            output["text"] for output in cell.get("outputs", ()) if output.get("name") == "stdout"
        ).split()
        for cell in notebook.cells
    ]
    return [words for words in cells if words]


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of the client's own parts
def test_the_notebook_prints_what_it_shows(smollm2_path, tmp_path, monkeypatch):
    run = nbformat.read(NOTEBOOK, as_version=4)
    packages = [str(Path(package.__file__).parents[1]) for package in (fq, fq_kernels)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")]))
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(run, timeout=300, kernel_name="python3", resources=folder).execute()
    found = printed(run)
    assert found == printed(nbformat.read(NOTEBOOK, as_version=4))
    words = " ".join(word for words in found for word in words)
    assert float(re.search(r"ratio of the means (\S+)", words)[1]) > 1
    assert "the same to the last bit: True" in words
    kinds = [output.output_type for cell in run.cells for output in cell.get("outputs", ())]
    assert "display_data" in kinds, "there is no plot"


def test_the_notebook_holds_nothing_of_a_machine():
    """Outputs are as the program prints them: no paths, no times, no errors; and there is a plot to see."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert not re.search(r"(?<![\w.])/(tmp|home|work|root|usr)/", NOTEBOOK.read_text("utf-8"))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
