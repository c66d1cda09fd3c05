"""The house: wings with doors, rooms of a size that is read in one sitting, words that stay in their wing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for folder in ("dora_lab", "analysis", "experiments") for file in sorted((ROOT / folder).rglob("*.py"))]
LINES, FUNCTION = 400, 60
# longer, each for a reason
LONG_FILES = {"dora_lab/mini/corpus.py": "the sentences of the embedded world, which is hashed: text more than code"}
LONG_FUNCTIONS = {"dora_lab/mini/pretrain.py:pretrain": "one recipe from start to end, as base/record.json tells it"}
# what is said in one wing alone: (what, pattern, where it may stand)
KEPT = [
    ("a tier is compared", r"\.tier\s*(==|!=|in\b)", "dora_lab/launch/runtime.py dora_lab/spec.py"),
    ("a layer is known by its class", r"isinstance\([^)]*\b(Lora|Dora|Magnitude)Linear", "dora_lab/methods/"),
    ("a method is known by its name", r"method\.name\s*(==|in)\s*[\"'(]", "dora_lab/methods/ dora_lab/spec.py"),
    # the cost of a protocol is counted where no torch is
    ("a protocol is known by its name", r"protocol\s*==\s*[\"']", "dora_lab/evaluation/ dora_lab/launch/cost.py"),
    ("weights are read or written", r"\b(save|load)_file\(", "dora_lab/formats/ dora_lab/training/"),
]  # fmt: skip


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_every_wing_has_a_door_that_says_what_belongs_in_it() -> None:
    for folder in sorted(path.parent for path in (ROOT / "dora_lab").rglob("__init__.py")):
        words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert words and len(words) > 60, folder


def test_the_readme_names_the_wings_that_there_are() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("\ndora_lab/\n")[2].partition("\nexperiments/")[0]
    told = set(re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.M))
    there = {path.stem for path in (ROOT / "dora_lab").iterdir() if not path.name.startswith("_")}
    assert told == there


@pytest.mark.parametrize("file", FILES, ids=name)
def test_rooms_are_read_in_one_sitting(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert (text.count("\n") <= LINES) != (name(file) in LONG_FILES), f"{text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert (length <= FUNCTION) != (f"{name(file)}:{node.name}" in LONG_FUNCTIONS), f"{node.name}: {length}"


@pytest.mark.parametrize(("what", "pattern", "places"), KEPT, ids=[what for what, _, _ in KEPT])
def test_what_one_wing_knows_no_other_asks(what: str, pattern: str, places: str) -> None:
    found = {
        name(file): match.group()
        for file in FILES
        if name(file).startswith("dora_lab/") and not name(file).startswith(tuple(places.split()))
        if (match := re.search(pattern, file.read_text(encoding="utf-8")))
    }
    assert not found, what


def test_the_spine_is_what_contributing_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### The spine")[2].partition("\n#")[0]
    spine = re.findall(r"`((?:dora_lab|experiments)/[\w/]+\.py)`", text)
    assert 5 <= len(spine) <= 10
    assert sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in spine) < 2000
