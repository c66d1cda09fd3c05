"""The benchmark of the probe: its contenders do what they say on small matrices; the table says what was not met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.tables import probe_speed as table
from experiments import probe_speed

SMALL = probe_speed.shapes(32, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bench")
    probe_speed.prepare(found, SMALL, rank=4)
    return found


def test_contenders_agree_where_they_compute_the_same(folder: Path) -> None:
    for method in ("full", "lora"):
        rows = {row["module"]: row for row in probe_speed.contender(f"ours/{method}", folder)()}
        naive = probe_speed.contender(f"naive/{method}", folder)()
        assert len(naive) == len(rows) == 7
        for name, (delta_m, delta_d) in zip(sorted(rows), naive, strict=True):
            assert rows[name]["delta_m"] == pytest.approx(delta_m, rel=1e-3)
            assert rows[name]["delta_d"] == pytest.approx(delta_d, rel=1e-2)
    assert len(probe_speed.contender("ours/dora-x4", folder)()) == 28


def test_every_contender_takes_every_round(folder: Path) -> None:
    for cell in ("pair", "adapter", "many"):
        taken = probe_speed.seconds(cell, folder, rounds=2)
        assert list(taken) == list(probe_speed.CELLS[cell])
        assert all(len(values) == 2 and min(values) > 0 for values in taken.values())


def test_the_callback_is_timed() -> None:
    spent, whole = probe_speed.callback("dora", steps=4)
    assert 0 < spent < whole


def test_table(tmp_path: Path) -> None:
    assert table.build(tmp_path) == []
    common = {"shapes": {"a": [10, 20]}, "blocks": 32, "machine": {"processor": "a core"}, "packages": {"torch": "2"}}
    common |= {"code": {"commit": "abc", "diff": None}}
    rows = [
        {"cell": "pair", "taken": {"ours/full": [3.0, 3.0, 3.3], "floor/pair": [2.0, 2.0, 2.0]}},
        {"cell": "memory", "taken": {"ours/full": [1600.0]}},
        {"cell": "callback", "taken": {"dora": [0.5, 10.0]}},
    ]
    (tmp_path / "bench").mkdir()
    text = "".join(json.dumps(row | common) + "\n" for row in rows)
    (tmp_path / "bench" / "probe_speed.jsonl").write_text(text)
    written = next(path for path in table.build(tmp_path) if path.suffix == ".md").read_text()
    assert "| ours/full / floor/pair | 1.50 [1.50, 1.57] | ≤ 1.4 | no, by 0.10 |" in written
    assert "| ours/lora / floor/base | not run | ≤ 1.5 |" in written
    assert "| ours/full: peak memory / largest tensor in float32 | 2.00 | ≤ 4.0 | yes |" in written
    assert "5.00 %" in written and "| 96" in written
