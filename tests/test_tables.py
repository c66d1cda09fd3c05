"""Tables for papers: they fit the page, by arithmetic and, where a LaTeX is installed, as it sets them; safe CSV."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from dora_lab import report
from dora_lab.report import latex

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "results" / "tables").glob("*.tex"))
PAPER = r"""\documentclass[twocolumn]{article}
\usepackage{booktabs,array,longtable}
\textwidth 6.75in \columnsep 0.25in \textheight 9in \topmargin -0.5in \oddsidemargin -0.1in
\begin{document}
%s
\end{document}
"""
needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")


def complaints(folder: Path, tex: str) -> list[str]:
    """What LaTeX says of tables on a page of two columns: errors, and what does not fit."""
    (folder / "paper.tex").write_text(PAPER % tex, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-no-shell-escape", "paper.tex"]
    for _ in range(3):  # a longtable finds its columns' widths from run to run
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
    log = done.stdout
    wrong = re.findall(r"^!.*|^Overfull .hbox.*|.*Float too large.*|.*multiply defined.*|.*Too many.*", log, re.M)
    return wrong + ([] if done.returncode == 0 and (folder / "paper.pdf").exists() else [log[-2000:]])


@needs_latex
@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_tables_fit_a_page_of_two_columns(file: Path, tmp_path: Path) -> None:
    assert complaints(tmp_path, file.read_text(encoding="utf-8")) == []
