"""Both notebooks run from top to bottom with the interpreter that runs the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "results"


def execute(name: str, knobs: str = "") -> nbformat.NotebookNode:
    """Run a notebook in notebooks/, with `knobs` as a cell after the one tagged "parameters"."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), f"{name} is committed with outputs"
    if knobs:
        at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(knobs))
    # the running interpreter as the kernel, whatever kernels are registered on this machine
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})"))
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    return client.execute()


def test_dora_by_hand() -> None:
    pytest.importorskip("dora_lab.adapters")
    cells = execute("01_dora_by_hand.ipynb").cells
    assert "the same weight" in str(cells[-1].outputs)


def test_delta_m_delta_d_on_synthetic_records(synthetic_results: Path) -> None:
    cells = execute("02_delta_m_delta_d.ipynb", f"from pathlib import Path\nresults = Path({str(synthetic_results)!r})")
    assert "3 seeds × 16 points" in str(cells.cells)


@pytest.mark.skipif(not any(COMMITTED.glob("runs/commonsense/*/probe.jsonl")), reason="no committed runs")
def test_delta_m_delta_d_on_the_committed_records() -> None:
    execute("02_delta_m_delta_d.ipynb")
