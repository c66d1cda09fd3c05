"""A sample of the matrix (`make matrix` is the whole), that it can see a fault, and what the committed one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.tables import matrix as table
from tests import matrix, matrix_models

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
COMMITTED = Path(__file__).resolve().parents[1] / "results"
# rank 3 of LoRA and DoRA: six checks of an odd layer, nine of a model, on each kind of layer that it has
SAMPLE = {
    "gpt2": {"right": 36}, "t5": {"right": 34, "refused": 2}, "opt": {"right": 18, "refused": 4, "–": 14},
    "mixtral": {"right": 36}, "a row of zeros": {"right": 12}, "a subclass": {"right": 12},
    "Conv1d, stride and padding": {"right": 12}, "weight norm": {"refused": 12},
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample(name: str) -> None:
    row = matrix.summed(name, list(matrix.results([name])))
    assert {how: count for how, count in row.items() if how in matrix.HOW} == SAMPLE[name], row


def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    load = matrix.load_adapter

    def off(model: Any, path: Path) -> Any:
        with torch.no_grad():
            for _, layer in matrix.adapted(load(model, path)):
                layer.lora_B[0, 0] += 1e-6
        return model

    def broken(model: Any, path: Path) -> Any:
        raise AttributeError("a name that is not there")

    for fault, how in ((off, "wrong"), (broken, "traceback")):
        monkeypatch.setattr(matrix, "load_adapter", fault)
        cells = {(row["check"], row["method"]): row["how"] for row in matrix.results(["a plain Linear"])}
        for check in ("outputs", "gradients", "to PEFT", "merge"):
            assert cells[check, "lora"] == cells[check, "dora"] == how, check
        assert cells["identity", "lora"] == "right"


def test_the_committed_matrix_is_whole_and_clean(tmp_path: Path) -> None:
    lines = (COMMITTED / "bench" / "matrix.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    assert [row["base"] for row in rows] == list(matrix_models.ALL)
    assert len(matrix_models.FAMILIES) >= 40 and len(matrix_models.ODD) == 20
    assert not any({"wrong", "traceback"} & row.keys() for row in rows)
    assert all("refused because" in row for row in rows if "refused" in row)
    text = (COMMITTED / "tables" / "matrix.md").read_text(encoding="utf-8")
    assert "| 0 | 0 | embed_positions: a OPTLearnedPositionalEmbedding cannot be adapted |" in text
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "matrix.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert next(path for path in table.build(tmp_path) if path.suffix == ".md").read_text(encoding="utf-8") == text
    assert table.build(tmp_path / "nothing") == []
