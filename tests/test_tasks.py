"""Tasks: labels and parsing, both templates byte for byte, and errors that name file, item and field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import arc_items, boolq_items

from dora_lab.tasks import (
    ItemError,
    all_tasks,
    check_items,
    load_task,
    prompt,
    read_items,
    table_1,
    train_prefix,
    train_text,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "llm_adapters"
S16 = " " * 16
HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ITEM = {
    "instruction": "Is it {red}?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


def test_tasks_are_in_the_papers_order() -> None:
    columns = [task.column for task in table_1()]
    assert columns == ["BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"]
    assert all_tasks()[: len(columns)] == table_1()


def test_to_know_the_tasks_takes_the_standard_library_alone() -> None:
    """A family has more beside its tasks: definitions for lm-eval, which load `datasets`."""
    code = """
import sys
before = set(sys.modules)
from dora_lab.tasks import all_tasks
all_tasks()
rooms = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(rooms - sys.stdlib_module_names - {"dora_lab"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"arc_easy.*did you mean 'ARC-Easy'|choices.*ARC-Easy"):
        load_task("arc_easy")


def test_first_match_is_the_answer_and_case_counts() -> None:
    assert load_task("boolq").parse("it is false, not true") == "false"
    assert load_task("boolq").parse("False") is None
    assert load_task("ARC-Easy").parse("the correct answer is answer5") == "answer5"
    assert load_task("piqa").parse("") is None


def test_patterns_are_those_of_the_protocol() -> None:
    assert load_task("boolq").pattern == "true|false"
    assert load_task("social_i_qa").pattern == "answer1|answer2|answer3|answer4|answer5"
    assert load_task("hellaswag").pattern == "ending1|ending2|ending3|ending4"


def test_options_come_from_the_item() -> None:
    assert load_task("ARC-Easy").options(arc_items(1)[0]) == ("answer1", "answer2", "answer3")
    assert load_task("openbookqa").options({"instruction": "no format"}) == ("answer1", "answer2", "answer3", "answer4")


@pytest.mark.parametrize(
    "said",
    [
        "answer1/answer2/answer3",
        "answer1 / answer2 / answer3",
        " answer1/answer2/answer3.",
        "answer1/answer2 /answer3 .\n",
    ],
)
def test_options_however_they_are_written(said: str) -> None:
    assert load_task("ARC-Easy").options({"instruction": f"Which?\n\nAnswer format:{said}"}) == (
        "answer1", "answer2", "answer3",
    )  # fmt: skip


@pytest.mark.parametrize(
    "said", ["answer1", "", "answer1, answer2", "answer1/answer1", "a/b/c", "answer1/answer2\nThink."]
)
def test_options_that_cannot_be_read_are_refused(said: str) -> None:
    item = arc_items(1)[0] | {"instruction": f"Which?\n\nAnswer format: {said}"}
    with pytest.raises(ItemError, match="here, item 0, field 'instruction': 'Answer format:' is followed by"):
        check_items([item], load_task("ARC-Easy"), "here")


def test_clean_template_is_the_same_in_training_and_evaluation() -> None:
    assert train_prefix(ITEM, "clean") == prompt(ITEM, "clean")
    assert train_text(ITEM, "clean") == prompt(ITEM, "clean") + "the correct answer is true"
    assert prompt(ITEM, "clean").encode() == (
        f"{HEAD}\n\n### Instruction:\n{ITEM['instruction']}\n\n### Response:\n".encode()
    )


def test_published_template_is_byte_for_byte_as_released() -> None:
    train = f"{HEAD}  \n\n{S16}### Instruction:\n{S16}{{i}}\n{S16}\n{S16}### Response:\n{S16}{{o}}"
    evaluation = f"{HEAD} \n\n{S16}### Instruction:\n{S16}{{i}}\n\n{S16}### Response:\n{S16}"
    text = train.replace("{i}", ITEM["instruction"]).replace("{o}", ITEM["output"])
    assert train_text(ITEM, "published").encode() == text.encode()
    assert prompt(ITEM, "published").encode() == evaluation.replace("{i}", ITEM["instruction"]).encode()


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown template 'clear'"):
        prompt(ITEM, "clear")


def _without(field: str) -> list[dict[str, Any]]:
    items = boolq_items(3)
    del items[2][field]
    return items


def _changed(**changes: Any) -> list[dict[str, Any]]:
    items = boolq_items(3)
    items[1] |= changes
    return items


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (_without("answer"), r"item 2, field 'answer': missing"),
        (_without("output"), r"item 2, field 'output': missing"),
        (_changed(answer="maybe"), r"item 1, field 'answer': 'maybe' is not a label of boolq: true, false"),
        (_changed(answer=1), r"item 1, field 'answer': expected text"),
        (_changed(input="a passage"), r"item 1, field 'input': must be empty"),
        (_changed(instruction=" "), r"item 1, field 'instruction': empty"),
        (_changed(output="the correct answer is false"), r"item 1, field 'output'.*'true'"),
        ([], "an empty list"),
        ({"data": []}, "a JSON dict"),
        (["text"], "item 0"),
    ],
)
def test_bad_items_are_named(tmp_path: Path, items: Any, message: str) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items), encoding="utf-8")
    with pytest.raises(ItemError, match=message) as caught:
        read_items(file, load_task("boolq"))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{}\n{}\n", r"test\.json, line 2: another JSON value follows the first"),
        (json.dumps(boolq_items(9)).encode()[:-200], r"broken or truncated JSON at line 1, column \d+"),
        (b'[{"instruction": "\xff"}]', "not UTF-8 at byte 18"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "test.json"
    file.write_bytes(content)
    with pytest.raises(ItemError, match=message) as caught:
        read_items(file, load_task("boolq"))
    assert str(file) in str(caught.value)


def test_answer_that_is_not_offered_is_refused(tmp_path: Path) -> None:
    item = arc_items(1)[0] | {"answer": "answer4", "output": "the correct answer is answer4"}
    file = tmp_path / "test.json"
    file.write_text(json.dumps([item]))
    with pytest.raises(ItemError, match="not among the answers that the item offers, answer1/answer2/answer3"):
        read_items(file, load_task("ARC-Easy"))


def test_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(boolq_items(2)), encoding="utf-8-sig")
    assert len(read_items(file, load_task("boolq"))) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real LLM-Adapters files are not at {REAL}")
@pytest.mark.parametrize(
    ("name", "count"), [("boolq", 3270), ("piqa", 1838), ("social_i_qa", 1954), ("ARC-Easy", 2376)]
)
def test_real_files_are_read_whole(name: str, count: int) -> None:
    assert len(read_items(REAL / name / "test.json", load_task(name))) == count
