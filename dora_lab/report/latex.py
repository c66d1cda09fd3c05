"""A table as LaTeX that fits a page of two columns: its widths are known before it is set.

Needs \\usepackage{booktabs,array,longtable}. Widths are those of Computer Modern, in which most letters are wider than
in Times; what is too wide for one column stands across both (table*), what is too wide for both is broken into lines,
what is too high for a page is a longtable on pages of one column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dora_lab.report.block import Block

COLUMN, PAGE, HEIGHT = 234.0, 487.0, 600.0  # pt: 3.25 and 6.75 inches (ICML), and nine with room for a caption
NEEDS = r"% \usepackage{booktabs,array,longtable}"
SEPARATION = 2.5  # pt, on both sides of every column
SIZES = {"footnotesize": (8.0, 9.5), "scriptsize": (7 * 1.08, 8.0)}  # pt of letters (cmr7 is wider for its size), lines
LONGEST = 24  # letters of a word that has nowhere else to be broken

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$",
    "†": r"$^\dagger$", "Δ": r"$\Delta$", "α": r"$\alpha$", "δ": r"$\delta$", "η": r"$\eta$", "λ": r"$\lambda$",
    "–": "--", "−": "$-$", "×": r"$\times$", "→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$", "‖": r"$\|$", "₀": "$_0$",
    "`": "", "…": r"\dots{}", "é": r"\'e", "\u00a0": "~", "\u200b": r"\allowbreak{}",
}  # fmt: skip
# letters of cmr8 by their width, in thousandths of the size
_LETTERS = (
    (296, "!',.:;<[]`il"), (325, "fj"), (355, "-"), (384, "I"), (414, "()rt"), (420, "s"), (473, "cez"),
    (503, ">?"), (532, '"$*/0123456789^_ago{}~\\'), (546, "J"), (562, "kqvxy"), (591, "Sbdhnpu"), (665, "LZ"),
    (694, "F"), (724, "EP"), (753, "B"), (768, "CTw"), (797, "AHNRUVXY"), (835, "DGK&+=@OQ"), (886, "#%m"),
    (974, "M"), (1092, "W"),
)  # fmt: skip
_WIDTHS = {letter: width / 1000 for width, letters in _LETTERS for letter in letters} | {
    " ": 0.355, "±": 0.9, "−": 0.83, "×": 0.83, "→": 1.07, "≤": 0.83, "≥": 0.83, "<": 0.83, ">": 0.83, "–": 0.54,
    "†": 0.4, "Δ": 0.89, "α": 0.69, "δ": 0.5, "η": 0.55, "λ": 0.65, "‖": 0.54, "|": 0.3, "₀": 0.47, "…": 1.3, "é": 0.48,
    "\u00a0": 0.355, "\u200b": 0.0,
}  # fmt: skip
_SPREAD = re.compile(r"(?<=\d) ?± ?([\d.]+)")  # set as an index
_JOINED = re.compile(r"(?<=\d,) (?=[−\d.]+\])|(?<=\bp) (?=[<\d])|(?<=<) (?=\d)")  # inside an interval, a p
_PIECES = re.compile(rf"[{re.escape(''.join(_WIDTHS.keys() - {' ', '/'}))}]{{1,{LONGEST}}}/?|.")
_BREAK = "\u200b"  # where a line may end, though no space is there


def latex_escape(text: str) -> str:
    """Text for pdflatex, ASCII on one line; a character without a LaTeX form here becomes its code, "[U+6F22]"."""
    return "".join(_TEX.get(one, one if one.isascii() else _code(one)) for one in CONTROLS.sub(" ", text))


def _code(letter: str) -> str:
    return f"[U+{ord(letter):04X}]"


def width(text: str) -> float:
    """How wide a text is set on one line, in units of the size of its letters."""
    before, *rest = _SPREAD.split(text)
    index = sum(0.85 * width(f"±{spread}") + 0.07 for spread in rest[::2])  # 6 pt beside 8, and half a point behind
    letters = CONTROLS.sub(" ", "".join([before, *rest[1::2]])).replace("`", "")
    return index + sum(_WIDTHS[one] if one in _WIDTHS else 0.75 * len(_code(one)) for one in letters)


def latex(block: Block, title: str, name: str, more: Sequence[str] = (), narrow: bool = False) -> str:
    """A block as one or, where its columns do not fit side by side, several tables, the first column in each.

    Args: title: of the page; name: of the file, for the label; more: what stands below besides the block's own notes;
        narrow: the form for one column of a page, without the notes.
    Raises: ValueError if the block has no columns.
    """
    columns = (block.narrow if narrow else block.wide) or block.columns()
    notes = block.said()[len(block.notes) :] if narrow else (*block.said(), *more)
    whole = sum(2 * SEPARATION + SIZES["footnotesize"][0] * max(map(width, lines)) for lines in _lines(block, columns))
    room = COLUMN if narrow or whole <= COLUMN else PAGE
    label = "-".join([name, *re.findall(r"[a-z0-9]+", block.title.lower()), *(["narrow"] if narrow else [])])
    tables = []
    for number, part in enumerate(_parts(block, columns, room), 1):
        which, said = ("", "") if number == 1 else (f"-{number}", " (continued)")
        caption = f"{title}: {block.title}{said}."
        height = 9.5 * sum(width(text) * SIZES["footnotesize"][0] // room + 1 for text in (caption, *notes))
        head = rf"\caption{{{latex_escape(caption)}}}\label{{tab:{label}{which}}}"
        tables.append(_table(_Layout.of(block, part, room), head, notes, height))
    return "\n\n".join(tables)


def _lines(block: Block, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Per column: its head and its cells."""
    return list(zip(columns, *block.rows(columns), strict=True))


def _words(text: str) -> list[list[str]]:
    """The words of a text, each as the pieces between which a line may end."""
    text = _SPREAD.sub(r"±\1", CONTROLS.sub(" ", text).replace(_BREAK, ""))
    words = re.split(r"[ \t]+", _JOINED.sub("\u00a0", text).strip())
    return [_PIECES.findall(word) for word in words]


def _least(block: Block, columns: tuple[str, ...], size: float) -> list[float]:
    """The widths of columns in which every line is broken that can be, in pt."""
    return [
        size * max((width(piece) for text in lines for word in _words(text) for piece in word), default=0)
        for lines in _lines(block, columns)
    ]


def _parts(block: Block, columns: tuple[str, ...], room: float) -> list[tuple[str, ...]]:
    """Columns that fit side by side, the first of them in every part."""
    least = dict(zip(columns, _least(block, columns, SIZES["scriptsize"][0]), strict=True))
    parts = [columns[:1]]
    for name in columns[1:]:
        if len(parts[-1]) > 1 and sum(least[one] + 2 * SEPARATION for one in (*parts[-1], name)) > room:
            parts.append(columns[:1])
        parts[-1] += (name,)
    return parts


@dataclass(frozen=True)
class _Layout:
    """A part of a block as it is set: size of letters, form of the columns, its rows, height in pt."""

    size: str
    form: str
    head: str
    body: list[str]
    height: float
    room: float

    @classmethod
    def of(cls, block: Block, columns: tuple[str, ...], room: float) -> _Layout:
        """The largest size in which every line that can be broken finds room."""
        inside, lines = room - 2 * SEPARATION * len(columns), _lines(block, columns)
        for name, (size, baseline) in SIZES.items():  # noqa: B007 - the last is kept, whether it fits or not
            least = _least(block, columns, size)
            if sum(least) <= inside:
                break
        whole = [size * max(map(width, of_column)) for of_column in lines]
        widths = _widths(whole, least, inside)
        broken = [given < full for given, full in zip(widths, whole, strict=True)]
        form, rows, height = "", [], 0.0
        for column, cut, given in zip(columns, broken, widths, strict=True):
            left = block.left(column)
            ragged = rf">{{\ragged{'right' if left else 'left'}\arraybackslash}}p{{{math.floor(10 * given) / 10:g}pt}}"
            form += ragged if cut else "l" if left else "r"
        for row in zip(*lines, strict=True):
            cells = list(zip(row, broken, widths, strict=True))
            rows.append(
                " & ".join(_cell(text, cut) for text, cut, _ in cells) + (r" \\[2pt]" if any(broken) else r" \\")
            )
            height += 2 + baseline * max(
                math.ceil(1.2 * size * width(text) / given) if cut else 1 for text, cut, given in cells
            )
        if block.apart:
            rows.insert(len(rows) - block.apart, r"\midrule")
        return cls(name, form, rows[0], rows[1:], height, room)


def _widths(whole: Sequence[float], least: Sequence[float], room: float) -> list[float]:
    """The width of each column in pt: what is widest gives way most, by the third root of its width."""

    def given(share: float) -> list[float]:
        return [max(few, min(full, share * full ** (1 / 3))) for few, full in zip(least, whole, strict=True)]

    if sum(whole) <= room:
        return list(whole)
    low, high = 0.0, max(whole) ** (2 / 3)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(given(middle)) <= room else (low, middle)
    return given(low)


def _table(layout: _Layout, head: str, notes: Sequence[str], height: float) -> str:
    """A float, or a longtable where it is higher than a page; `height`: of caption and notes."""
    said = "\\par\n".join(map(latex_escape, notes))
    style = rf"\{layout.size}\setlength{{\tabcolsep}}{{{SEPARATION}pt}}"
    top = [r"\toprule", layout.head, r"\midrule"]
    if layout.height + height > HEIGHT:
        lines = [
            r"\begingroup",
            r"\makeatletter\if@twocolumn\onecolumn\let\then\twocolumn\else\let\then\relax\fi\makeatother",
            rf"{style}\setlength{{\LTcapwidth}}{{\textwidth}}",
            rf"\begin{{longtable}}{{{layout.form}}}",
            rf"{head}\\",
            *top, r"\endfirsthead", *top, r"\endhead", r"\bottomrule", r"\endfoot", *layout.body,
            r"\end{longtable}",
            rf"\noindent\footnotesize {said}\par",
            r"\then\endgroup",
        ]  # fmt: skip
        return "\n".join(lines)
    star = "*" if layout.room == PAGE else ""
    lines = [
        rf"\begin{{table{star}}}[tbp]", r"\centering", style, head, rf"\begin{{tabular}}{{{layout.form}}}",
        *top, *layout.body, r"\bottomrule", r"\end{tabular}",
        rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {said}}}",
        rf"\end{{table{star}}}",
    ]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str, broken: bool) -> str:
    if broken:
        text = " ".join(_BREAK.join(word) for word in _words(text))
    before, *rest = _SPREAD.split(text)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return latex_escape(before) + "".join(rf"$_{{\pm {spread}}}$" + latex_escape(after) for spread, after in pairs)
