"""The paper's numbers, cell by cell: which runs count, prediction intervals, verdicts, flags, re-runs by others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from analysis.tables import paper as table
from dora_lab import paper
from dora_lab.launch.experiments import published_specs
from dora_lab.models import shapes
from dora_lab.report import statistics
from dora_lab.spec import Spec, derive, to_dict

PUBLISHED = published_specs()
Writer = Callable[..., Path]


def published(method: str = "dora", rank: int = 16, seed: int = 0, **changes: Any) -> Spec:
    """A published spec of LLaMA-7B, changed by dotted paths with __ for the dot."""
    named = [s for s in PUBLISHED if shapes.printed_name(s.model.name) == "LLaMA-7B" and s.seed == seed]
    spec = next(s for s in named if (s.method.name, s.method.rank) == (method, rank))
    return derive(spec, {path.replace("__", "."): value for path, value in changes.items()})


def write(root: Path, run_writer: Writer, spec: Spec, percent: float, base: str = "LLaMA-7B", unparsed: int = 0,
          status: str = "complete") -> None:  # fmt: skip
    """A run of that spec, every task scored with the same accuracy, on a base of that model's size."""
    folder = run_writer(root, to_dict(spec), status=status)
    record = json.loads((folder / "record.json").read_text())
    trained = shapes.PAPER[base][0].trained(spec.method)
    record["params"] = {"trainable": trained, "total": shapes.PAPER[base][0].parameters() + trained}
    (folder / "record.json").write_text(json.dumps(record))
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"value": percent / 100, "n": 1000, "n_unparsed": unparsed}
        row.pop("correct", None)  # the answers of the synthetic run would contradict that
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def found(root: Path) -> pd.DataFrame:
    return paper.cells(root, paper.claims(), PUBLISHED)


def average(root: Path, method: str = "DoRA†") -> dict[str, Any]:
    rows = found(root).set_index(["source", "model", "method", "subject"])
    (row,) = rows.loc[[("Table 1", "LLaMA-7B", method, "average")]].to_dict("records")
    return row


def test_the_prediction_interval_is_that_of_one_more_draw() -> None:
    low, high = statistics.prediction_interval([77.0, 78.0, 79.0])
    assert (low + high) / 2 == pytest.approx(78)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * 1.0 * (4 / 3) ** 0.5)
    draws = stats.norm.rvs(size=(4000, 4), random_state=1)
    inside = [a <= new <= b for *seen, new in draws for a, b in [statistics.prediction_interval(seen)]]
    assert sum(inside) / len(inside) == pytest.approx(0.95, abs=0.012)
    with pytest.raises(ValueError, match="at least two"):
        statistics.prediction_interval([1.0])


def test_without_runs_no_cell_has_a_number(tmp_path: Path) -> None:
    cells = found(tmp_path)
    assert len(cells) == len(paper.claims().query("kind == 'number'")) >= 360
    assert set(cells["verdict"]) == {"not run"} and not cells["n"].any()
    assert cells[["mean", "sd", "low", "high", "unparsed_percent"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((77.0, 78.0, 79.0), "undecided"),  # 0.45 ± 2.92 · 1.15 points
        ((77.4, 77.6, 77.5), "equivalent"),
        ((60.0, 60.2, 60.1), "does not hold"),
        ((77.5, 77.5, 77.5), "equivalent"),
        ((78.54, 78.54, 78.54), "equivalent"),  # 77.5 may stand for 77.55
        ((78.6, 78.6, 78.6), "does not hold"),
        ((77.5, 77.5), "2 of 3"),
        ((10.0,), "1 of 3"),
    ],
)
def test_verdicts(scores: tuple[float, ...], verdict: str, tmp_path: Path, run_writer: Writer) -> None:
    for seed, score in enumerate(scores):
        write(tmp_path, run_writer, published(seed=seed), score)
    cell = average(tmp_path)
    assert (cell["verdict"], cell["n"]) == (verdict, len(scores))
    assert cell["mean"] == pytest.approx(sum(scores) / len(scores))
    assert average(tmp_path, "DoRA")["verdict"] == "not run", "rank 32 has no runs"
    counts, ran = paper.summary(found(tmp_path), "commonsense")
    assert verdict in set(ran["verdict"]) and "Table 2" not in set(counts["source"])
    assert not len(paper.summary(found(tmp_path), "nonsense")[0])


def test_what_is_no_run_of_the_cell_does_not_count(tmp_path: Path, run_writer: Writer) -> None:
    write(tmp_path, run_writer, published(seed=0), 77.0, base="LLaMA-13B")  # a folder of that name, another model
    write(tmp_path, run_writer, published(seed=1, data__train_on_prompt=False), 86.0)
    write(tmp_path, run_writer, published(seed=2), 77.0, status="failed")
    write(tmp_path, run_writer, derive(published(seed=2), {"tier": "mini"}), 77.0)
    write(tmp_path, run_writer, derive(published(seed=2), {"evaluation.split": "validation"}), 77.0)
    cell = average(tmp_path)
    assert (cell["verdict"], cell["n"]) == ("not run", 0)
    assert "1 run of another protocol left out" in cell["flags"]
    assert "1 run failed or interrupted" in cell["flags"]


def test_what_cannot_change_a_result_does_not_matter(tmp_path: Path, run_writer: Writer) -> None:
    changes = ({"model__name": "llama-7b-hf", "model__revision": "ab12"}, {"optim__micro_batch_size": 4},
               {"evaluation__batch_size": 1, "data__sha256": "0" * 64, "probe__fractions": (0.5, 1.0)})  # fmt: skip
    for seed, change in enumerate(changes):
        write(tmp_path, run_writer, published(seed=seed, **change), 77.0)
    assert average(tmp_path)["n"] == 3
    write(tmp_path, run_writer, derive(published(model__pad="own", data__tasks=("piqa", "boolq")), {"seed": 7}), 77.0)
    rows = found(tmp_path).query("source == 'Table 1' and model == 'LLaMA-7B' and method == 'DoRA†'")
    counts = dict(zip(rows["subject"], rows["n"], strict=True))
    assert (counts["BoolQ"], counts["PIQA"], counts["SIQA"], counts["average"]) == (4, 4, 3, 3)
    write(tmp_path, run_writer, published(seed=1, optim__micro_batch_size=2), 20.0)
    assert average(tmp_path)["n"] == 3, "a seed that was run twice is one draw"


def test_settings_are_cells_of_their_own(tmp_path: Path, run_writer: Writer) -> None:
    for spec in (spec for spec in PUBLISHED if spec.experiment != "commonsense"):
        if shapes.printed_name(spec.model.name) == "LLaMA-7B" and spec.seed == 0:
            write(tmp_path, run_writer, spec, 70.0)
    rows = found(tmp_path)
    ran = rows[(rows["n"] > 0) & (rows["subject"] == "average")]
    cells = {(row.source, row.method, row.setting, row.rank) for row in ran.itertuples()}
    assert cells == {
        *(("Table 15", "LoRA", "", rank) for rank in (4, 8, 16, 64)),
        *(("Table 15", "DoRA", "", rank) for rank in (4, 8, 64)),
        *(("Section 5.5 (Figure 5)", method, "", rank) for method in ("LoRA", "DoRA") for rank in (4, 8)),
        ("Table 6", "DoRA", "m: QKVOGUD, V: QKV", 32),
        ("Table 7", "DoRA", "norm in graph", 32),
    }


def test_a_task_that_was_not_scored_takes_the_average_away(tmp_path: Path, run_writer: Writer) -> None:
    spec = published()
    write(tmp_path, run_writer, spec, 70.0)
    file = next(tmp_path.rglob("eval.jsonl"))
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"piqa"' not in line))
    rows = (
        found(tmp_path).query("source == 'Table 1' and model == 'LLaMA-7B' and method == 'DoRA†'").set_index("subject")
    )
    assert rows.loc["average", "n"] == 0 and rows.loc["PIQA", "n"] == 0 and rows.loc["SIQA", "n"] == 1


def test_below_chance_and_unparsed_are_flagged(tmp_path: Path, run_writer: Writer) -> None:
    write(tmp_path, run_writer, published(), 40.0, unparsed=11)
    rows = found(tmp_path).set_index(["source", "method", "rank", "subject"])
    flags = rows.loc[("Table 1", "DoRA†", 16, "BoolQ"), "flags"].iloc[0]
    assert flags == "ours 40.0 below chance; unparsed 1.1 %"
    assert "re-run 11.5 below chance; ours 40.0" in rows.loc[("Table 1", "DoRA†", 16, "WinoGrande"), "flags"].iloc[0]
    assert "ours" not in rows.loc[("Table 1", "DoRA†", 16, "ARC-e"), "flags"].iloc[0]
    own = rows.sort_index().loc[("Table 15", "LoRA", 4)]["flags"]
    assert own["BoolQ"] == "the paper's 2.3 below chance" and own["ARC-e"] == ""
    assert own["average"] == "the paper's below chance in BoolQ, PIQA, SIQA, HellaSwag"
    paper = rows[rows["flags"].str.contains("the paper's \\d", regex=True)]
    assert len(paper) == 9 and set(paper.index.get_level_values("source")) == {"Table 15"}


def test_the_spread_of_re_runs_stands_beside_the_paper(tmp_path: Path) -> None:
    cell = average(tmp_path)
    assert (cell["paper"], cell["n_reruns"], cell["reruns_low"], cell["reruns_high"]) == (77.5, 3, 53.6, 62.7)
    for told in ("60.1 (NVlabs/DoRA#26, run 1)", "53.6 (NVlabs/DoRA#26, run 2)", "62.7 (NVlabs/DoRA#14"):
        assert told in cell["reruns"]
    assert cell["released"] == "77.5 (NVlabs/DoRA#26)"
    at_32 = average(tmp_path, "DoRA")
    assert at_32["n_reruns"] == 2, "78.2 is told twice in one thread, of one run"
    assert "in graph" not in at_32["reruns"]
    lora = average(tmp_path, "LoRA")
    assert lora["elsewhere"] == "76.3 (NVlabs/DoRA README)" and pd.isna(lora["reruns"])


def test_the_table_says_not_run_for_every_cell(synthetic_results: Path) -> None:
    """Runs of tier mini are there; none of them is one of the paper's models."""
    text = table.build(synthetic_results)[0].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and " | not run | not run |" in line]
    cells = paper.claims().query("kind == 'number'")
    averages = cells[(cells["subject"] == "average") & (cells["metric"] == "accuracy_percent")]
    assert len(lines) == len(cells) + len(averages)
    assert "| LLaMA-7B | DoRA† | 16 | 77.5 | 77.5 (NVlabs/DoRA#26) | 3 | 53.6 | 77.5 | 23.9 |" in text
    assert "| hqsiswiliam/hira#7 | LoRA | loss on the answer alone, model not stated | average | 86.48 |" in text


def test_the_table_with_runs(tmp_path: Path, run_writer: Writer) -> None:
    for seed, score in enumerate((77.0, 78.0, 79.0)):
        write(tmp_path, run_writer, published(seed=seed), score)
    text = table.build(tmp_path)[0].read_text(encoding="utf-8")
    assert "| 78.0±1.0 (n = 3) | [73.0, 83.0] | undecided |" in text


def test_every_model_of_the_paper_tier_has_a_shape() -> None:
    decoders = [spec for spec in PUBLISHED if spec.model.family == "decoder"]  # VL-BART's counts: test_vl_bart
    assert {shapes.printed_name(spec.model.name) for spec in decoders} == set(shapes.PAPER)
