"""How a command ends: what an error becomes, one clear line and an exit code, is decided here and nowhere else."""

from __future__ import annotations

import codecs
import io
import os
import sys
import traceback
from collections.abc import Callable

from dora_lab import __version__
from dora_lab.io.text import shown

ASKED, MACHINE, OURS, STOPPED = 2, 3, 70, 130
CODES = (
    "Exit codes: 0 done, and as hoped; 1 done, and the answer is no (a run failed, numbers differ, a file is damaged); "
    "2 it cannot be done as asked (a name, an option, an input); 3 the machine refused (a file, the disk, memory); "
    "70 a fault of the lab; 130 stopped by a signal, goes on when asked again."
)
_ASCII = {"Δ": "Delta ", "–": "-", "−": "-", "†": "+", "→": "->", "≤": "<=", "≥": ">=", "…": "...", "×": "x", "±": "+-"}


def run_to_end(command: Callable[[], object]) -> None:
    """Call `command`; an exception ends the process with the exit code that `CODES` names, and a line on stderr."""
    codecs.register_error("ascii-words", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # somebody may have put another there
            stream.reconfigure(errors="ascii-words")
    try:
        command()
    except Exception as error:
        text, code = told(error)
        if code == OURS:
            traceback.print_exc()
        print(shown(f"error: {text}"), file=sys.stderr)
        sys.exit(code)


def told(error: Exception) -> tuple[str, int]:
    """(what a person is told, exit code) of an exception that a command could not help."""
    # torch's name for a GPU without memory; torch itself need not be here to ask
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        words = "out of memory: fewer --jobs, a smaller optim.micro_batch_size or evaluation.batch_size take less"
        return " ".join([words, f"({error})" if str(error) else ""]).strip(), MACHINE
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{place}{error.strerror or error}", MACHINE
    if isinstance(error, (ValueError, ArithmeticError)):  # all our errors about input are; their text says what to do
        return str(error), ASKED
    return f"a fault of dora-lab {__version__}, not of what was asked: please report it with the lines above", OURS


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What a terminal's encoding has no sign for, in words that it has."""
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    words = (_ASCII.get(sign) or sign.encode("unicode_escape").decode() for sign in signs)
    return "".join(words), error.end
