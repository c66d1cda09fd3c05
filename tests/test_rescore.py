"""Scoring saved texts again: the same by the task's own pattern, other by another one, and the record untouched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_spec, write_run
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.evaluation.rescore import rescore
from dora_lab.runs.errors import StoreError
from dora_lab.runs.streams import read_stream

TEXTS = {
    "boolq": [
        ("the correct answer is true", "true"),
        ("True\u2028", "true"),
        ("yes", "true"),
        ("false or true", "true"),
    ],
    "ARC-Easy": [("answer2", "answer2"), ("(2)", "answer2"), ("answer1\n### Response: answer3", "answer3")],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tasks whose samples and scores are those of TEXTS."""
    path = write_run(tmp_path, make_spec("lora", 8, 0, data__tasks=list(TEXTS), evaluation__protocols=["generate"]))
    (path / "samples").mkdir()
    rows = []
    for task, texts in TEXTS.items():
        parsed = {"boolq": ["true", None, None, "false"], "ARC-Easy": ["answer2", None, "answer3"]}[task]
        samples = [
            {"index": n, "prompt": "?", "output": text, "parsed": answer, "gold": gold, "correct": answer == gold}
            for n, ((text, gold), answer) in enumerate(zip(texts, parsed, strict=True))
        ]
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (path / "samples" / f"{task}.generate.jsonl").write_text(lines, encoding="utf-8")
        value = sum(sample["correct"] for sample in samples) / len(samples)
        row = next(row for row in read_stream(path, "eval") if row["task"] == task)
        correct = "".join(str(int(sample["correct"])) for sample in samples)
        rows.append(row | {"value": value, "n": len(samples), "n_unparsed": parsed.count(None), "correct": correct})
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_patterns_give_the_record(run: Path) -> None:
    rows, _ = rescore(run)
    assert [(row["task"], row["value"], row["n_unparsed"]) for row in rows] == [
        ("boolq", 1 / 4, 2),
        ("ARC-Easy", 2 / 3, 1),
    ]
    assert all((row["value"], row["n_unparsed"]) == (row["old_value"], row["old_n_unparsed"]) for row in rows)
    assert [row["correct"] for row in rows] == ["1000", "101"]


def test_another_pattern_for_one_task(run: Path) -> None:
    rows, _ = rescore(run, ["boolq=(?i)true|false"])
    assert [(row["value"], row["n_unparsed"]) for row in rows] == [(2 / 4, 1), (2 / 3, 1)]
    rows, _ = rescore(run, ["nothing", "ARC-Easy=(answer[1-5])"])
    assert [(row["value"], row["n_unparsed"]) for row in rows] == [(0.0, 4), (2 / 3, 1)]
    assert [row["pattern"] for row in rows] == ["nothing", "(answer[1-5])"]


def test_a_match_that_is_no_label_is_no_answer(run: Path) -> None:
    rows, _ = rescore(run, [r"ARC-Easy=(\d)|(?i:ANSWER3)", "boolq=(?i)yes|true|FALSE"])
    assert [(row["correct"], row["n_unparsed"]) for row in rows] == [("1100", 1), ("000", 3)]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["boolk=true"], r"'boolk' is no task of this run; did you mean 'boolq'\? .*'\(\?:boolk\)=true'"),
        (["piqa=solution1"], "'piqa' is no task of this run"),
        (["boolq=a", "boolq=b"], "boolq=b: a second pattern for boolq"),
        (["true", "false"], "false: a second pattern for all tasks"),
    ],
)
def test_patterns_of_nobody(run: Path, patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rescore(run, patterns)
    assert not (run / "rescored").exists()


def test_a_pattern_for_all_may_hold_an_equals_sign(run: Path) -> None:
    rows, _ = rescore(run, ["(?=t)true"])
    assert [row["correct"] for row in rows] == ["1001", "000"]
    assert [row["correct"] for row in rescore(run, ["boolq = true"])[0]] == ["0000", "101"]


@pytest.mark.parametrize("field", ["output", "gold"])
def test_samples_of_other_scores_are_refused(field: str, run: Path) -> None:
    file = run / "samples" / "boolq.generate.jsonl"
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    samples[3] |= {"output": "true"} if field == "output" else {"gold": "false"}
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    with pytest.raises(StoreError, match=r"task boolq, item 3: wrong in the record, its saved text is right"):
        rescore(run, ["true|false"])


def test_every_choice_has_its_file_and_the_record_stays(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("record.json", "eval.jsonl")}
    files = {rescore(run)[1], rescore(run, ["(?i)true|false"])[1], rescore(run)[1]}
    assert len(files) == len(list((run / "rescored").iterdir())) == 2
    assert before == {name: (run / name).read_bytes() for name in before}


def test_what_cannot_be_scored(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--pattern boolq=\(: not a regular expression"):
        rescore(run, ["boolq=("])
    file = run / "samples" / "boolq.generate.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join(lines[:-2]) + "\n", encoding="utf-8")
    with pytest.raises(StoreError, match="3 samples, the record scored 4"):
        rescore(run)
    file.write_text(lines[0] + "\n{}\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"boolq.generate.jsonl, line 2, field 'output'"):
        rescore(run)
    file.unlink()
    with pytest.raises(StoreError, match=r"samples/boolq\.generate\.jsonl is missing"):
        rescore(run)
    bare = write_run(tmp_path / "bare", make_spec("lora", 8, 1))
    with pytest.raises(StoreError, match="no samples/"):
        rescore(bare)
    with pytest.raises(StoreError, match="is this a run directory"):
        rescore(tmp_path / "nowhere")


def test_command_and_no_torch(run: Path) -> None:
    mine = ["--results", str(run.parents[2])]
    done = CliRunner().invoke(command.app, ["rescore", str(run), "--pattern", "boolq=(?i)true|false"])
    assert done.exit_code == 0, done.output
    assert "25.0 → 50.0" in done.output and "2 → 1" in done.output
    rows = json.loads(CliRunner().invoke(command.app, ["rescore", run.name[:6], *mine, "--format", "json"]).stdout)
    assert [(row["task"], row["value"] - row["old_value"]) for row in rows] == [("boolq", 0), ("ARC-Easy", 0)]
    code = "import sys, dora_lab.evaluation.rescore; sys.exit(bool({'torch', 'lm_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
