"""Every fault, injected a few times: survived as required. The campaign is `make torture`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from analysis.tables import faults as table
from tests.faults import NUMBERS, Fault, Skipped, all_faults, fault
from tests.faults import __main__ as campaign
from tests.faults._fuzz import TARGETS

ALL = all_faults()


@pytest.mark.parametrize("one", ALL, ids=[f"{one.number}: {one.name}" for one in ALL])
def test_a_fault_is_survived(one: Fault, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            said = one.inject(folder, random.Random(number))
        except Skipped as reason:
            pytest.skip(f"fault {one.number} ({one.name}) cannot be injected here: {reason}")
        assert said and "\n" not in said


def test_every_number_has_a_fault() -> None:
    lost = [number for number in NUMBERS if number not in {one.number for one in ALL}]
    assert not lost, f"no fault is registered for {', '.join(lost)}"


def test_a_fault_that_is_not_survived_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def inject(folder: Path, rng: random.Random) -> str:
        assert rng.random() < 0.5, "lost"
        return f"seen in {folder}"

    row = campaign.inject(Fault("1", "half", inject), times=40, seconds=60, seed=0)
    assert row["times"] == 40 and 5 < row["survived"] < 35
    assert (row["sees"], row["error"]) == ("seen in …", "AssertionError: lost")
    with pytest.raises(ValueError, match="registered twice"):
        fault(ALL[0].number, ALL[0].name)(ALL[0].inject)


def test_the_campaign_writes_its_table(tmp_path: Path) -> None:
    assert table.build(tmp_path) == []
    arguments = ["--times", "2", "--cases", "5", "--only", "9,10,fuzz", "--results", str(tmp_path)]
    assert campaign.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench" / "faults.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == ["9", "10", *["fuzz"] * len(TARGETS)]
    text = (tmp_path / "tables" / "faults.md").read_text(encoding="utf-8")
    assert "| 9 | a rank above the dimension | 2 | 2 |" in text and f"{5 * len(TARGETS)} cases" in text
    rows[0] |= {"survived": 1, "error": "AssertionError: lost"}
    (tmp_path / "bench" / "faults.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.build(tmp_path)
    text = (tmp_path / "tables" / "faults.md").read_text(encoding="utf-8")
    assert "not survived: AssertionError: lost" in text and "1 of 4 injections was not survived" in text
