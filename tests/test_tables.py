"""Tables for papers: they fit the page, by arithmetic and, where a LaTeX is installed, as it sets them; safe CSV."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from dora_lab import report
from dora_lab.io.text import no_formula
from dora_lab.report import latex

TABLES = Path(__file__).resolve().parents[1] / "results" / "tables"
COMMITTED = sorted(TABLES.glob("*.tex"))
PAPER = r"""\documentclass[twocolumn]{article}
\usepackage{booktabs,array,longtable}
\textwidth 6.75in \columnsep 0.25in \textheight 9in \topmargin -0.5in \oddsidemargin -0.1in
\begin{document}
%s
\end{document}
"""
needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
SOURCE = report.Provenance(("x",), ("mini",), ("abc",), (), False, {})


def log_of(folder: Path, tex: str) -> str:
    """What pdflatex says of a text on a page of two columns."""
    (folder / "paper.tex").write_text(PAPER % tex, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-no-shell-escape", "paper.tex"]
    for _ in range(3):  # a longtable finds its columns' widths from run to run
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
    return done.stdout


def unfit(folder: Path, tex: str) -> list[str]:
    """Errors, and what does not fit."""
    log = log_of(folder, tex)
    found = re.findall(r"^!.*|^Overfull .hbox.*|.*Float too large.*|.*multiply defined.*", log, re.M)
    return found if "Output written" in log else [*found, log[-2000:]]


def plain(tex: str) -> str:
    """The text that became this LaTeX."""
    text = re.sub(r"\$_\{\\pm ([\d.]+)\}\$", r" ± \1", tex)
    for letter, form in sorted(latex._TEX.items(), key=lambda pair: -len(pair[1])):
        text = text.replace(form, letter) if form and form != letter else text
    return text


def too_wide(tex: str) -> list[str]:
    """Tables that are wider than their column or page, and words that are wider than their column, by arithmetic."""
    found = []
    pattern = r"\\begin\{(table\*?|longtable)\}.*?\\end\{\1\}"
    for table in re.finditer(pattern, tex, re.S):
        room = latex.COLUMN if table[1] == "table" else latex.PAGE
        form = re.search(r"\\begin\{(?:tabular|longtable)\}\{(.*)\}\n", table[0])
        size = re.findall(r"\\(\w+)\\setlength\{\\tabcolsep", tex[: table.end()])[-1]
        assert form is not None
        columns = re.findall(r"l|r(?!a)|p\{([\d.]+)pt\}", re.sub(r">\{[^}]*\}", "", form[1]))
        rows = [re.split(r"(?<!\\) & ", line.partition(r" \\")[0]) for line in table[0].splitlines() if r" \\" in line]
        assert rows and {len(row) for row in rows} == {len(columns)}, table[0][:300]
        total = 2 * latex.SEPARATION * len(columns)
        for given, cells in zip(columns, zip(*(map(plain, row) for row in rows), strict=True), strict=True):
            words = [piece for cell in cells for word in latex._words(cell) for piece in word] if given else cells
            needed = latex.SIZES[size][0] * max(map(latex.width, words))
            total += float(given or needed)
            found += [f"{needed:.1f} in {given}: {words}"] if given and needed > float(given) + 0.11 else []
        found += [f"{total:.1f} in {room}: {table[0][:300]}"] if total > room + 0.01 else []
    return found


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_tables_fit_by_arithmetic(file: Path) -> None:
    assert too_wide(file.read_text(encoding="utf-8")) == []


@needs_latex
@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_tables_fit_as_latex_sets_them(file: Path, tmp_path: Path) -> None:
    assert unfit(tmp_path, file.read_text(encoding="utf-8")) == []


@needs_latex
def test_the_arithmetic_is_that_of_latex(tmp_path: Path) -> None:
    texts = sorted({cell for name in ("paper", "commonsense", "why") for cell in cells_of(name)})[::7]
    tex = "".join(rf"\setbox0\hbox{{\footnotesize {latex._cell(text, False)}}}\typeout{{W=\the\wd0}}" for text in texts)
    set_as = [float(found) for found in re.findall(r"^W=([\d.]+)pt", log_of(tmp_path, tex), re.M)]
    assert len(set_as) == len(texts) > 30
    for text, true in zip(texts, set_as, strict=True):
        assert true - 0.5 <= 8 * latex.width(text) <= 1.1 * true + 1, (text, true, 8 * latex.width(text))


def cells_of(name: str) -> list[str]:
    """The cells of a committed page."""
    lines = (TABLES / f"{name}.md").read_text(encoding="utf-8").splitlines()
    return [cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize("file", sorted(TABLES.glob("*.md")), ids=lambda file: file.stem)
def test_every_committed_table_says_what_it_is_not(file: Path) -> None:
    _, *blocks = re.split(r"^## ", file.read_text(encoding="utf-8"), flags=re.M)
    assert blocks
    for block in blocks:
        assert "\nWhat this is not: " in block, block[:200]
        prose = [line for line in block.splitlines()[1:] if not line.startswith(("|", "<!--"))]
        assert max(map(len, prose)) <= 100


def test_labels_captions_and_what_it_is_not(tmp_path: Path) -> None:
    cells = pd.DataFrame({"Method": ["DoRA"], "Rate": ["0.01"], "BoolQ": ["78.7 ± 9.0"], "Average": ["92.7 ± 1.1"]})
    block = report.Block(
        title="A block, b=1", cells=cells, narrow=("Method", "Rate", "Average"), wide=("Method", "BoolQ")
    )
    paths = report.save_table(tmp_path, "t", "A page", [block], cells, SOURCE, isnt="another thing.")
    assert [path.name for path in paths] == ["t.md", "t.tex", "t.csv", "t_narrow.tex"]
    md, wide, _, narrow = (path.read_text(encoding="utf-8") for path in paths)
    assert (
        r"\caption{A page: A block, b=1.}\label{tab:t-a-block-b-1}" in wide and "BoolQ" in wide and "Rate" not in wide
    )
    assert r"\label{tab:t-a-block-b-1-narrow}" in narrow and "BoolQ" not in narrow
    assert all("What this is not: another thing." in text for text in (md, wide, narrow))
    assert wide.startswith("% runs: abc\n% Experiment x, tier mini, 1 complete run")
    assert "| DoRA | 0.01 | 92.7 ± 1.1 |" in md and "| DoRA | 78.7 ± 9.0 |" in md
    with pytest.raises(ValueError, match="two blocks with the title 'A block, b=1'"):
        report.save_table(tmp_path, "t", "A page", [block, block], cells, SOURCE)
    with pytest.raises(ValueError, match="no column Rat for its narrow or wide form"):
        report.Block(title="x", cells=cells, narrow=("Rat",))


WIDE = pd.DataFrame({f"Column {i}": ["1234567.8 ± 9.0"] for i in range(20)})
TEXT = pd.DataFrame({"Method": ["DoRA"] * 4, "Words": ["word " * 80, "x" * 300, "a/b" * 90, "漢" * 50]})
LONG = pd.DataFrame({"Method": [f"run {i}" for i in range(99)], "Score": ["1.0"] * 99})


@pytest.mark.parametrize(
    ("cells", "tables", "longtables"), [(WIDE, 3, 0), (TEXT, 1, 0), (LONG, 0, 1)], ids=["wide", "text", "long"]
)
def test_what_does_not_fit_is_broken(cells: pd.DataFrame, tables: int, longtables: int, tmp_path: Path) -> None:
    tex = latex.latex(report.Block(title="x", cells=cells, notes=("A note.",)), "t", "n")
    assert tex.count(r"\begin{table") == tables and tex.count(r"\begin{longtable}") == longtables
    assert too_wide(tex) == [] and len(set(re.findall(r"\\label\{(.*?)\}", tex))) == tables + longtables
    assert shutil.which("pdflatex") is None or unfit(tmp_path, tex) == []


def test_lines_of_prose_open_no_list() -> None:
    note = "word " * 19 + "a - b " * 20 + "1. one # two > three + four"
    lines = report.markdown(report.Block(title="x", cells=LONG, notes=(note,))).split("\n\n")[-1].splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 100
    assert not [line for line in lines if re.match(r"[-+*#>]|\d+[.)]( |$)", line)]


FORMULAS = ["=1+1", "+1+cmd", "-cmd", "@x", "\t=1", "\r=1", "\n=1", " =1", "-1-2", "-0.5 0.3", "＝1", "-1.2.3", "+"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_cell_that_may_be_a_formula_is_none(text: str, tmp_path: Path) -> None:
    assert no_formula(text) == f"'{text}"
    data = pd.DataFrame({text: [text]})
    _, _, path = report.save_table(tmp_path, "t", "t", [report.Block(title="t", cells=data)], data, SOURCE)
    with path.open(newline="", encoding="utf-8") as lines:
        assert list(csv.reader(lines)) == [["'" + text.replace("\r", "\n")]] * 2


@pytest.mark.parametrize("text", ["-1", "+1.5", "-.5e-3", "-1.", "a=1", "", "−1", "1-2"])
def test_a_number_stays_as_it_is(text: str) -> None:
    assert no_formula(text) == text


@pytest.mark.parametrize("file", sorted(TABLES.glob("*.csv")), ids=lambda file: file.stem)
def test_no_committed_csv_holds_a_formula(file: Path) -> None:
    with file.open(newline="", encoding="utf-8") as lines:
        assert {cell for row in csv.reader(lines) for cell in row if no_formula(cell) != cell} == set()
