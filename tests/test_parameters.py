"""The paper's numbers of trainable parameters: counted on real modules of the paper's models, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from analysis.tables import parameters as table
from dora_lab import mini, paper
from dora_lab.models import shapes
from dora_lab.spec import Method
from experiments import parameters


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    yield parameters.count()
    parameters.counted.cache_clear()


def name_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["source"], row["model"], row["method"], row["setting"], row["rank"]


def test_every_printed_percentage_is_reached(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 44 and len({name_of(row) for row in rows}) == 44
    found = {name_of(row): table.comparison(row["trainable"], row["total"], row["printed_percent"]) for row in rows}
    assert {name for name, word in found.items() if word.startswith("differs")} == {
        ("Table 1", "LLaMA3-8B", "DoRA†", None, 16)
    }
    assert list(found.values()).count("equal") == 35
    # the one that differs is what LoRA has at that rank, without the magnitudes
    lora = parameters.counted(
        shapes.PAPER["LLaMA3-8B"][0], Method(name="lora", rank=16, alpha=32.0, target_modules=parameters.FIVE)
    )
    assert table.comparison(lora["trainable"], lora["total"], 0.35) == "equal"


def test_they_are_the_numbers_of_the_reference(rows: list[dict[str, Any]]) -> None:
    claims = paper.claims()
    known = claims[claims["metric"] == "trainable_parameters"]
    counted = {(row["model"], row["trainable"]) for row in rows}
    assert len(known) == 13
    assert {(model, int(value)) for model, value in zip(known["model"], known["value"], strict=True)} <= counted
    assert ("LLaMA-7B", 56_975_360) in counted


def test_arithmetic_from_shapes_is_what_the_modules_have(rows: list[dict[str, Any]]) -> None:
    checked = 0
    for row in rows:
        method = parameters.method_of(row["source"], row["method"], row["setting"] or "", row["rank"] or 0)
        if method is not None:
            shape = shapes.PAPER[row["model"]][0]
            assert shape.trained(method) == row["trainable"]
            assert shape.parameters() + row["trainable"] == row["total"]
            checked += 1
    assert checked == 34


@pytest.mark.parametrize(
    ("method", "trainable", "total", "printed", "word"),
    [("LoRA", 340_795_392, 7_382_718_464, 4.61, "cut off"), ("DoRA", 342_155_264, 7_384_078_336, 4.63, "equal")],
)
def test_llava_is_counted_as_the_paper_prints_it(
    method: str, trainable: int, total: int, printed: float, word: str
) -> None:
    (row,) = (row for row in parameters.count_llava() if row["method"] == method)
    assert row["printed_percent"] == printed and row["rank"] == 128
    assert parameters.of_llava(method) == {"trainable": trainable, "total": total}
    assert table.comparison(trainable, total, printed) == word
    # the <image> token: a row of the embeddings and one of the head; 64 rows on the hub
    runs = [parameters.of_llava(method, rows)["total"] - total for rows in (32_001, 32_064)]
    assert runs == [2 * 4096, 64 * 2 * 4096]


def test_a_wrong_count_is_told() -> None:
    assert table.comparison(838, 100_000, 0.84) == "equal"
    assert table.comparison(838, 100_000, 0.83) == "cut off"
    assert table.comparison(4_145, 1_000_000, 0.42) == "of the base"
    assert table.comparison(838, 100_000, 0.86) == "differs: 0.838"


def test_shapes_of_a_folder(tmp_path: Path) -> None:
    folder = Path(mini.folder())
    shape, config = shapes.of_folder(folder), AutoConfig.from_pretrained(folder)
    assert (shape.layers, shape.attention, shape.tied) == (config.num_hidden_layers, config.hidden_size, True)
    assert shape.parameters() == 1_148_032  # what the committed records count
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        shapes.of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match="field 'intermediate_size'"):
        shapes.of_folder(tmp_path)
    assert shapes.printed_name("meta-llama/llama-2-7b-hf") == "LLaMA2-7B"
    assert shapes.printed_name("folder/llama-7b-hf") == "LLaMA-7B" and shapes.printed_name("mini") is None


def test_methods_that_cannot_be_counted_are_refused() -> None:
    shape = shapes.of_folder(Path(mini.folder()))
    lora = {"name": "lora", "rank": 4, "alpha": 8.0}
    assert shape.trained(Method(name="base")) == 0 and shape.trained(Method(name="ft")) == shape.parameters()
    for method, message in (
        (Method(**lora, target_modules=("q_proj", "wq")), "'wq' is no linear layer here; .*choices: down_proj"),
        (Method(**lora, target_modules=("q_proj",), rank_pattern=("q_proj=8",)), "rank_pattern"),
        (Method(name="newest"), "method 'newest'"),
    ):
        with pytest.raises(ValueError, match=message):
            shape.trained(method)


def test_the_command_and_its_table(rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "count", lambda: rows)
    every = [*rows, *parameters.count_vl_bart(), *parameters.count_llava()]
    assert table.build(tmp_path) == []
    parameters.main(["--results", str(tmp_path)])
    written = (tmp_path / "bench" / "parameters.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(written) == len(every) and json.loads(written[0])["code"].keys() == {"commit", "diff"}
    text = table.build(tmp_path)[0].read_text(encoding="utf-8")
    assert "| LLaMA-7B | DoRA | 32 | 56,975,360 | 0.838 | 0.84 | equal | modules |" in text
    assert "| VL-BART | DoRA | 128 | 8,838,912 | 5.962 | 5.96 | equal | modules |" in text
    assert "| VL-BART | LoRA | 128 | 7,607,040 | 5.173 | 5.17 | equal | modules |" in text
    assert "| LLaVA-1.5-7B | LoRA | 128 | 340,795,392 | 4.616 | 4.61 | cut off | modules |" in text
    assert "| LLaMA3-8B | DoRA† | 16 | 29,097,984 | 0.361 | 0.35 | differs: 0.361 | modules |" in text
