"""The notebook, from its first cell to its last, with a few questions and steps."""

import json
import re

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
FEW = ROOT / "tests" / "data" / "few_scenes.yaml"
QUICK = f"""
QUESTIONS, STEPS = 40, 2
SIZE = ["--devices", "1", "--data.recipe", {str(FEW)!r}, "--data.max_samples", "64", "--train.batch_size", "8"]
FOLDER = "notebook"
"""


def printed(cell) -> str:
    """Return what a cell said and showed, as text."""
    texts = [output.get("text", "") for output in cell.outputs]
    shown = [output["data"] for output in cell.outputs if "data" in output]
    return "\n".join([*texts, *(data.get("text/markdown", data.get("text/plain", "")) for data in shown)])


def test_every_cell_runs(tmp_path, monkeypatch):
    """In a folder of its own, in a kernel that finds this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = QUICK
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kept = [re.findall(r" (\d+)$", printed(cell), re.MULTILINE) for cell in cells]
    assert kept[2] == ["144"] * 8 and kept[3] == kept[-1] == ["16"] * 8
    pictures = [sum("image/png" in output.get("data", ()) for output in cell.outputs) for cell in cells]
    assert (pictures[1], pictures[4], pictures[-2]) == (1, 1, 1)
    rows = [line for line in printed(cells[-2]).splitlines() if line.startswith("| d")]
    assert [row.split("|")[1].strip() for row in rows[:3]] == ["dense", "divprune", "divprune + tuned projector"]
    log = (tmp_path / "notebook" / "recalibrate" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 2


def test_it_is_stored_without_what_it_printed():
    stored = json.loads(NOTEBOOK.read_text())
    assert not [cell for cell in stored["cells"] if cell.get("outputs") or cell.get("execution_count")]
    assert NOTEBOOK.stat().st_size < 20_000
