"""The benchmark of a step: it measures what it says, resumes, and its table tells what was not run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.tables import speed as table
from experiments import speed

COMMITTED = Path(__file__).resolve().parents[1] / "results"
TINY = speed.Cell(32, 8, rank=2, layers=1, heads=2, key_value_heads=2, contenders=(*speed.ALL, "ft"))
DROPPED = speed.Cell(32, 8, rank=2, dropout=0.05, layers=1, heads=2, key_value_heads=2, contenders=speed.DROPPED)


def test_every_cell_has_its_own_name() -> None:
    assert len({cell.name() for cell in speed.cells()}) == len(speed.cells())
    for target in table.TARGETS:  # every target is measured somewhere
        where = [c for c in speed.cells() if all(getattr(c, key) == value for key, value in target.where.items())]
        assert where and all({target.over, target.under} <= set(cell.contenders) for cell in where), target


@pytest.mark.parametrize("cell", [TINY, DROPPED, speed.Cell(32, 1, rank=2, mode="evaluate")])
def test_every_contender_takes_every_round(cell: speed.Cell) -> None:
    taken = speed.measure(cell, rounds=3)
    assert set(taken) == set(cell.contenders)
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in taken.values())


def test_memory_is_that_of_a_step() -> None:
    taken = speed.measure(
        speed.Cell(256, 256, rank=4, layers=1, measure="bytes", contenders=("ours/dora", "ft")), rounds=1
    )
    gradients = 4 * (4 * 256**2 + 3 * 256 * 704)
    assert taken["ft"][0] > gradients, "full fine-tuning holds a gradient of every weight"
    assert 0 < taken["ours/dora"][0] < taken["ft"][0] + 2 * gradients


def test_resume_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "cells", lambda: [TINY, DROPPED])
    monkeypatch.setattr(speed, "ROUNDS", 2)
    assert table.build(tmp_path) == []
    speed.main(["--results", str(tmp_path), "--only", "p0-"])
    speed.main(["--results", str(tmp_path)])
    told = capsys.readouterr().out.split()
    assert told == [TINY.name(), DROPPED.name()], "a cell that is known was measured again"
    rows = [json.loads(line) for line in (tmp_path / "bench" / "speed.jsonl").read_text().splitlines()]
    # the numbers of a target's cell, made up: 1.5 against a limit of 1.05
    rows[0] |= table.LONG | {"hidden": 512, "taken": {"ours/dora": [3.0, 3.1, 2.9], "ours/lora": [2.0, 2.0, 2.0]}}
    (tmp_path / "bench" / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = next(path for path in table.build(tmp_path) if path.suffix == ".md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| ours/dora / ours/lora | hidden 512, 512"))
    assert "| 1.500 [1.475, 1.525] | ≤ 1.05 | no, by 0.450 | 1.016 |" in line
    assert "| ours/dora / ours/lora | hidden any, 2048 tokens, rank 16 | not run |" in text
    assert "| ours/lora / peft/lora | hidden 512, 512 tokens, rank 16 | not run |" in text
    (tmp_path / "bench" / "speed.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="a line is not a record of this benchmark"):
        speed.main(["--results", str(tmp_path)])


def test_the_readme_says_what_the_table_says() -> None:
    """The committed measurements, read by pandas alone."""
    rows = pd.read_csv(COMMITTED / "tables" / "speed.csv")
    rows = rows[(rows["measure"] == "seconds") & (rows["mode"] == "train") & (rows["dtype"] == "float32")]
    rows = rows[(rows["rank"] == 16) & (rows["accumulation"] == 1)]
    wide = rows.pivot_table(index=["dropout", "tokens", "hidden", "round"], columns="contender", values="value")

    def span(contender: str, dropout: float, tokens: slice) -> str:
        ratio = (wide[contender] / wide["ours/lora"]).dropna().loc[dropout].loc[tokens]
        medians = ratio.groupby(["tokens", "hidden"]).median()
        return f"{medians.min():.2f}-{medians.max():.2f}"

    text = " ".join((COMMITTED.parent / "README.md").read_text(encoding="utf-8").split())
    plain, few = span("ours/dora", 0, slice(512, None)), span("ours/dora", 0, slice(128, 128))
    dropped, branch = (span(name, 0.05, slice(None)) for name in ("ours/dora", "ours/dora-branch"))
    assert f"{plain} with 512 or more tokens, {few} with 128; with the published dropout (0.05, " in text
    assert f"on all but one base product) {dropped}, with dropout on the low-rank branch alone {branch} " in text
