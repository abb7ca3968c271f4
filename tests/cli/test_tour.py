"""`docs/tour.ipynb` runs from top to bottom, and what it shows is what it computes (slow: a minute)."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [set().union(*(output.get("data", {}) for output in cell.get("outputs", []))) for cell in notebook.cells]
    assert sum("image/png" in kind for kind in kinds) == 5
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "fashion-teacher: 16 passes of the context network, 800 calls of the head" in text
    assert "fashion-student: 8 passes of the context network, 8 calls of the head, 49 tokens" in text
