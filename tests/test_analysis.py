"""The table and figure scripts on a synthetic tree: structure, provenance, byte stability, nothing invented."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_spec

import analysis
from analysis.tables import commonsense


@pytest.fixture(scope="module")
def built(synthetic_results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the synthetic results with every table and figure built."""
    results = tmp_path_factory.mktemp("built")
    shutil.copytree(synthetic_results / "runs", results / "runs")
    for name in analysis.modules():
        importlib.import_module(name).build(results)
    return results


def test_all_scripts_are_found() -> None:
    assert {
        "analysis.tables.commonsense",
        "analysis.tables.verdicts",
        "analysis.figures.decomposition",
        "analysis.figures.layers",
    } <= set(analysis.modules())


def test_every_output_is_byte_stable(built: Path) -> None:
    outputs = sorted([*(built / "tables").iterdir(), *(built / "figures").iterdir()])
    assert {p.suffix for p in outputs} == {".md", ".csv", ".tex", ".pdf", ".png"}
    before = {path: path.read_bytes() for path in outputs}
    for name in analysis.modules():
        importlib.import_module(name).build(built)
    assert [path.name for path in outputs if path.read_bytes() != before[path]] == []


def test_the_table_keeps_protocols_and_the_paper_apart(built: Path) -> None:
    text = (built / "tables" / "commonsense.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.M)
    assert len(titles) == 3
    assert titles[0].endswith("protocol generate") and titles[1].endswith("protocol loglikelihood")
    assert titles[2].startswith("The paper's table 1")
    ours, paper = text.split("## The paper's table 1")
    assert [row.split("|")[1].strip() for row in ours.splitlines() if row.startswith("| ")][:9] == [
        "Method",
        "---",
        "Base",
        "FT",
        "LoRA",
        "DoRA",
        "DoRA†",
        "chance level",
        "always the most frequent label",
    ]
    assert "LLaMA" not in ours and paper.count("| LLaMA") == 18
    assert "13 complete runs, code 0123456789" in text and "2 runs are not complete" in text


def test_missing_is_a_dash_in_the_table_and_empty_in_the_csv(built: Path) -> None:
    text = (built / "tables" / "commonsense.md").read_text(encoding="utf-8")
    second = text.split("## ")[2]  # loglikelihood: nothing is parsed
    (row,) = [row for row in second.split("\n\n")[1].splitlines() if row.startswith("| LoRA")]
    assert row.split("|")[-3].strip() == "–"
    data = pd.read_csv(built / "tables" / "commonsense.csv")
    assert data.loc[data["protocol"].eq("loglikelihood"), "unparsed_percent"].isna().all()
    assert set(data["source"]) == {"this lab", "paper"}


@pytest.mark.parametrize("name", ["commonsense", "verdicts"])
def test_latex_is_plain_ascii_and_balanced(built: Path, name: str) -> None:
    text = (built / "tables" / f"{name}.tex").read_text(encoding="utf-8")
    assert text.isascii()
    parts = re.findall(r"\\begin\{(table\*?|longtable)\}.*?\\end\{\1\}", text, re.S)
    assert parts and text.count(r"\begin{") == sum(1 if part == "longtable" else 2 for part in parts)
    assert text.count(r"\toprule") == len(parts) + parts.count("longtable")
    assert text.count(r"\bottomrule") == text.count(r"\caption{") == text.count(r"\label{tab:") == len(parts)
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}") and len(re.findall(r"(?<!\\)\$", text)) % 2 == 0


def test_other_data_gets_blocks_and_figures_of_its_own(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    run_writer(tmp_path, make_spec("lora", 8, 0))
    run_writer(tmp_path, make_spec("lora", 8, 0, data__name="llm_adapters", data__tasks=["boolq", "piqa"]), skill=0.0)
    run_writer(tmp_path, make_spec("dora", 8, 0, evaluation__split="validation"))
    for name in analysis.modules():
        importlib.import_module(name).build(tmp_path)
    titles = re.findall(r"^## (.*)$", (tmp_path / "tables" / "commonsense.md").read_text(encoding="utf-8"), re.M)
    assert ["data mini" in t for t in titles[:4]] == [True, True, False, False]
    assert "DoRA |" not in (tmp_path / "tables" / "commonsense.md").read_text(encoding="utf-8").split("## The paper")[0]
    assert (tmp_path / "figures" / "decomposition_mini_mini_llm_adapters.png").exists()
    assert (tmp_path / "figures" / "decomposition_mini_mini_mini_validation.png").exists()


def test_without_runs_the_tables_hold_the_paper_alone(tmp_path: Path) -> None:
    for name in analysis.modules():
        importlib.import_module(name).build(tmp_path)
    text = (tmp_path / "tables" / "commonsense.md").read_text(encoding="utf-8")
    assert "no run is in it" in text and text.count("\n## ") == 1
    assert not (tmp_path / "figures").exists()


def test_the_readme_text_holds_the_default_and_one_model_of_the_paper(built: Path) -> None:
    text = commonsense.readme(built)
    assert "protocol generate" in text and "loglikelihood" not in text
    assert text.count("| LLaMA-7B") == 6 and "LLaMA-13B" not in text


def test_the_command_line_renews_the_readme(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:begin -->\n<!-- table:end -->\n")
    arguments = ["--results", str(built), "--readme", str(readme)]
    analysis.script(commonsense.build, argv=arguments, readme=commonsense.readme)
    assert "protocol generate" in readme.read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[-1] == str(readme)
