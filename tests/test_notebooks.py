"""The notebooks run from top to bottom with the interpreter that runs the tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
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
    pytest.importorskip("dora_lab.methods.inject")
    cells = execute("01_dora_by_hand.ipynb").cells
    assert "the same weight" in str(cells[-1].outputs)


def test_delta_m_delta_d_on_synthetic_records(synthetic_results: Path) -> None:
    cells = execute("02_delta_m_delta_d.ipynb", f"from pathlib import Path\nresults = Path({str(synthetic_results)!r})")
    assert "3 seeds × 16 points" in str(cells.cells)


@pytest.mark.skipif(not any((COMMITTED / "runs").glob("commonsense/*")), reason="no committed runs")
def test_delta_m_delta_d_on_the_committed_records() -> None:
    execute("02_delta_m_delta_d.ipynb")


def test_any_checkpoint_on_what_it_makes_itself() -> None:
    outputs = str([cell.get("outputs") for cell in execute("03_any_checkpoint.ipynb").cells])
    assert "checkpoint-40" in outputs and "model.layers.0.self_attn.q_proj" in outputs
    assert "image/png" in outputs and "between layers" in outputs


def test_any_checkpoint_on_an_adapter_of_its_own(tmp_path: Path) -> None:
    """A folder that is no series of checkpoints: one point per layer, and no view that needs two checkpoints fails."""
    from transformers import AutoModelForCausalLM

    from dora_lab import mini
    from dora_lab.formats.live import save_adapter
    from dora_lab.methods.inject import inject
    from dora_lab.spec import Method

    model = AutoModelForCausalLM.from_pretrained(mini.folder())
    inject(model, Method(name="dora", rank=4, alpha=8.0, target_modules=("q_proj", "v_proj")), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.01)
    save_adapter(model, tmp_path / "mine", base_name="mini")
    knobs = f"tuned = [{str(tmp_path / 'mine')!r}]\nkinds = ['q_proj']\naxis = 'in'"
    outputs = str([cell.get("outputs") for cell in execute("03_any_checkpoint.ipynb", knobs).cells])
    assert "adapter_config.json" in outputs and "pooled" in outputs and "v_proj" not in outputs


def test_what_decides_the_sign_on_one_matrix_and_in_one_run() -> None:
    outputs = str([cell.get("outputs") for cell in execute("04_what_decides_the_sign.ipynb", "items = 256").cells])
    assert "rotation" in outputs and "image/png" in outputs
    *_, last = re.findall(r"2\.5%((?: +-?\d\.\d+){4})\b", outputs)  # of key, query, up, value
    assert all(float(r) < 0 for r in last.split()), "with decay every kind is negative"


def test_pictures_and_what_is_said_of_them() -> None:
    outputs = str([cell.get("outputs") for cell in execute("05_pictures.ipynb", "epochs = 0.1\nasked = 10").cells])
    assert "image/png" in outputs and "from prose" in outputs and "coco_caption_novel" in outputs
