"""Visual instruction tuning as a command runs it, end to end on a tiny LLaVA: rows, scores, server files, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_benchmarks import save_benchmarks
from tiny_llava import save_llava, save_mix

from analysis.tables import visual_instruction as table
from dora_lab.launch import cost
from dora_lab.launch import plan as planning
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.methods.inject import inject
from dora_lab.metrics import score
from dora_lab.models import shapes
from dora_lab.models.llava import open_llava
from dora_lab.runs.errors import ResumeError
from dora_lab.runs.item_values import unpack
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import iter_runs
from dora_lab.spec import Spec, SpecError, derive
from dora_lab.tasks import ItemError, load_task
from dora_lab.tasks.items import UnreadableError
from dora_lab.training.fit import Interrupted
from experiments.visual_instruction import BASE, ITEMS, TASKS, specs

pytestmark = pytest.mark.usefixtures("one_thread")
HOUSE = Path(__file__).resolve().parents[1]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# what a processor and a model of a few thousand parameters need; everything else is the paper tier's
SMALL: dict[str, Any] = {
    "data.cutoff": 256, "optim.batch_size": 4, "optim.micro_batch_size": 2, "optim.epochs": 2,
    "optim.task_batch_sizes": "image=4,text=4", "evaluation.max_new_tokens": 4, "evaluation.batch_size": 3,
    "evaluation.task_new_tokens": "science_qa=6,mmbench=6",
}  # fmt: skip
ADAPTED = {"method.rank": 4, "method.alpha": 8}
ROWS = dict(zip(("ft", "lora", "dora"), specs("paper"), strict=False))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    where = tmp_path_factory.mktemp("llava")
    return Paths(where / "results", save_data(where / "data"), save_llava(where / "model"))


def save_data(folder: Path) -> Path:
    save_mix(folder)
    save_benchmarks(folder / "eval")
    return folder


def small(row: str, **changes: Any) -> Spec:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return derive(ROWS[row], SMALL | ({} if row == "ft" else ADAPTED) | named)


def rows(paths: Paths, spec: Spec, stream: str = "eval") -> list[dict[str, Any]]:
    return read_rows(run_path(paths.results, spec), stream)


def command(
    paths: Paths, *arguments: str, small: dict[str, Any] | None = None, launch: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """The command that a user types, made small; `launch`: what starts its processes."""
    changes = [text for name, value in (SMALL | (small or {})).items() for text in ("--with", f"{name}={value}")]
    words = [sys.executable, *launch, "-m", "dora_lab", "run", "visual_instruction", "--tier", "paper"]
    folders = ["--results", paths.results, "--data-dir", paths.data_dir, "--model-dir", paths.model_dir]
    return subprocess.run(
        [*map(str, [*words, *folders]), *arguments, *changes], capture_output=True, text=True, check=False, cwd=HOUSE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_table_12_from_start_to_end(row: str, paths: Paths) -> None:
    spec = small(row)
    assert run_spec(spec, paths) == "complete"
    check(run_path(paths.results, spec))
    assert run_spec(spec, paths) == "skipped"


def check(path: Path) -> None:
    """What the folder of a finished run holds."""
    record = read_record(path)
    assert record["training"]["steps"] == 4 + 2 and record["training"]["shortened"] == 0
    counts = record["inputs"]["items"]
    assert counts["train"] == {"image": 8, "text": 4} and {*counts["test"]} == {*TASKS}
    assert record["inputs"]["images"]["files"] == 8 + 10 and len(record["inputs"]["images"]["sha256"]) == 64
    tokens = record["inputs"]["tokens"]
    assert tokens["adds_bos"] and tokens["padding_side"] == "left" and tokens["eos"]["text"] == "</s>"
    trained = record["params"]["trainable"] / record["params"]["total"]
    assert (0.7 < trained < 1) == (record["spec"]["method"]["name"] == "ft")  # the tower is in the total alone
    scored = {row["task"]: row for row in read_rows(path, "eval")}
    assert {task: row["metric"] for task, row in scored.items()} == {
        "vqav2_test_dev": "on its server", "gqa_testdev": "accuracy", "vizwiz_test": "on its server",
        "science_qa": "accuracy_image", "text_vqa": "accuracy", "pope": "f1", "mmbench": "circular",
    }  # fmt: skip
    assert [*scored] == [*TASKS]
    assert all((row["value"] is None) == (row["metric"] == "on its server") for row in scored.values())
    files = {file.name for file in (path / "samples").iterdir() if "submission" in file.name}
    wanted = ("vqav2_test_dev.submission.json", "vizwiz_test.submission.json", "mmbench.submission.xlsx")
    assert files == {*wanted}
    sent = json.loads((path / "samples" / "vqav2_test_dev.submission.json").read_text())
    assert [row["question_id"] for row in sent] == [6, 7, 8] and sent[0]["answer"] == ""


def test_as_a_user_types_it(paths: Paths, tmp_path: Path) -> None:
    here = Paths(tmp_path, paths.data_dir, paths.model_dir)
    done = command(here, "--only", "method=dora", "--only", "seed=0", "--recompute", small=ADAPTED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 runs: 1 complete" in done.stdout and "generate" in done.stdout
    ((path, record),) = iter_runs(tmp_path)
    check(path)
    assert record["spec"]["model"]["name"] == "model" and record["inputs"]["data"]["sha256"] is not None


def test_rows_are_what_samples_and_items_say(paths: Paths) -> None:
    spec = small("dora", seed=7)
    assert run_spec(spec, paths) == "complete"
    folder = run_path(paths.results, spec)
    for row in rows(paths, spec):
        lines = (folder / "samples" / f"{row['task']}.generate.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == row["n"] and samples[0]["image"] == samples[0]["prompt"].startswith("<image>\n")
        if row["metric"] == "on its server":
            assert row["answer_nll"] is None and row["rules"] == {} and "per_item" not in row
            continue
        (metric,) = load_task(row["task"]).metrics
        again = score(metric, samples, {sample["id"]: sample["output"] for sample in samples}, row["task"])
        assert row["rules"] == {metric: again.summary} and row["value"] == again.summary[row["metric"]]
        nlls = unpack("answer_nll", row["per_item"]["answer_nll"])
        assert row["answer_nll"] == pytest.approx(nlls.mean(), rel=1e-3) and row["answer_nll"] > 0
        choices = row["task"] in ("science_qa", "pope", "mmbench")
        assert (row["choice_nll"] is not None) == choices == ("choice_nll" in row["per_item"])


def test_ft_moves_language_model_and_projector_and_nothing_of_the_tower(paths: Paths) -> None:
    spec = small("ft", optim__learning_rate="0.01")
    run_spec(spec, paths)
    assert paths.model_dir is not None
    before = load_file(paths.model_dir / "model.safetensors")
    after = load_file(run_path(paths.results, spec) / "adapter" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in moved)
    assert all("vision_tower" in name or name in moved for name in before if "embed_tokens" not in name)


def test_weights_keep_small_steps_that_bfloat16_would_lose(paths: Paths) -> None:
    """Products alone are in bfloat16: a step of 2e-5 moves weights of which it is a thousandth."""
    how = {"optim__learning_rate": "0.00002", "optim__epochs": "1", "data__tasks": "pope"}
    how["evaluation__task_new_tokens"] = ""
    one, other = small("ft", **how), small("ft", **how, optim__products="own")
    losses = []
    for spec in (one, other):
        run_spec(spec, paths)
        losses.append([row["loss"] for row in rows(paths, spec, "metrics")])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert paths.model_dir is not None
    folders = paths.model_dir, run_path(paths.results, one) / "adapter"
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    name = next(name for name in before if name.endswith("layers.0.mlp.up_proj.weight"))
    assert after[name].dtype == torch.float32
    assert (before[name] != after[name]).float().mean() > 0.9
    assert (before[name].bfloat16() != after[name].bfloat16()).float().mean() < 0.2


def test_a_run_that_was_stopped_is_the_same_to_the_byte(paths: Paths, tmp_path: Path) -> None:
    spec = small("dora", seed=3)
    one, two = (Paths(tmp_path / name, paths.data_dir, paths.model_dir) for name in ("one", "two"))
    run_spec(spec, one)
    stop = threading.Event()

    def at(phase: str, done: int, of: int, loss: float | None) -> None:
        if phase == "train" and done == 3:
            stop.set()

    with pytest.raises(Interrupted):
        run_spec(spec, two, Runtime(stop=stop, progress=at))
    assert run_spec(spec, two) == "complete"
    first, second = run_path(one.results, spec), run_path(two.results, spec)
    assert read_record(second)["training"]["resumed_from"] == 4  # the step after the one whose loss was told
    names = ["metrics.jsonl", "eval.jsonl", "adapter/adapter_model.safetensors"]
    names += [f"samples/{task}.generate.jsonl" for task in TASKS] + ["samples/vizwiz_test.submission.json"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_recomputing_changes_nothing_but_the_memory(paths: Paths, tmp_path: Path) -> None:
    spec = small("dora", seed=3, data__tasks="pope", evaluation__task_new_tokens="")
    found = []
    for recompute in (False, True):
        here = Paths(tmp_path / str(recompute), paths.data_dir, paths.model_dir)
        run_spec(spec, here, Runtime(recompute=recompute))
        folder = run_path(here.results, spec)
        found.append([(folder / name).read_bytes() for name in ("metrics.jsonl", "adapter/adapter_model.safetensors")])
    assert found[0] == found[1]


def test_what_is_wrong_is_said_before_training(paths: Paths, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    here = Paths(tmp_path / "results", data, paths.model_dir)
    (data / "eval/vqav2/llava_vqav2_mscoco_test2015.jsonl").write_text('{"question_id": 7}\n')
    with pytest.raises(ItemError, match=r"test2015\.jsonl: question '8' of test-dev is not in it"):
        run_spec(small("dora"), here)
    for changes, words in (
        (
            {"evaluation__max_new_tokens": "500"},
            r"line 1: a prompt of \d+ tokens and 500 new ones exceed",
        ),
        ({"data__cutoff": "20"}, r"mix665k\.json, item \d+: no token of an answer is among its first 20"),
        ({"data__tasks": "pope", "evaluation__task_new_tokens": "mmbench=6"}, "'mmbench' is not among data.tasks"),
    ):
        with pytest.raises(ItemError, match=words):
            run_spec(small("dora", **changes), paths)
    for changes, words in (
        ({"data__truncation": "prompt"}, "data.truncation = 'prompt': must be right"),
        ({"evaluation__num_beams": "2"}, "evaluation.num_beams = 2: must be 1"),
        ({"data__template": "clean"}, "data.template = 'clean': must be one of published"),
        ({"evaluation__weights": "unmerged"}, "evaluation.dtype = 'float16': must be own, but for merged weights"),
        ({"data__eos": "if_shorter"}, "must be one that reads data.eos"),
    ):
        with pytest.raises(SpecError) as caught:
            small("dora", **changes)
        assert words in str(caught.value)


def test_a_run_goes_on_with_its_own_images_alone(paths: Paths, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    here, spec, stop = Paths(tmp_path / "results", data, paths.model_dir), small("lora"), threading.Event()

    def at(phase: str, done: int, of: int, loss: float | None) -> None:
        if phase == "train" and done == 2:
            stop.set()

    with pytest.raises(Interrupted):
        run_spec(spec, here, Runtime(stop=stop, progress=at))
    image = next(iter((data / "coco" / "train2017").iterdir()))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(ResumeError, match=r"images\.sha256"):
        run_spec(spec, here)


def test_an_image_that_cannot_be_read_for_a_while_costs_no_work(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails in mid-training: the run is interrupted, goes on from its checkpoint, ends as undisturbed."""
    spec = small("lora", data__tasks="pope", evaluation__task_new_tokens="")
    one, two = (Paths(tmp_path / name, paths.data_dir, paths.model_dir) for name in ("one", "two"))
    assert run_spec(spec, one) == "complete"
    files, opened = [], Image.open

    def failing(file: Any) -> Any:
        files.append(file)
        if len(files) == 11:  # of sixteen, the third step with images
            raise OSError(5, "Input/output error")
        return opened(file)

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(
        UnreadableError, match=r"mix665k\.json, item \d+: .* cannot be opened \(OSError: .*Input/output"
    ):
        run_spec(spec, two, Runtime(checkpoint_steps=1))
    assert read_record(run_path(two.results, spec))["status"] == "interrupted"
    assert run_spec(spec, two) == "complete"
    first, second = run_path(one.results, spec), run_path(two.results, spec)
    assert read_record(second)["training"]["resumed_from"] >= 1
    for name in ("metrics.jsonl", "eval.jsonl", "adapter/adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_an_image_that_is_cut_short_is_said_before_training(paths: Paths, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    here, spec = Paths(tmp_path / "results", data, paths.model_dir), small("lora", data__tasks="vizwiz_test")
    spec = derive(spec, {"evaluation.task_new_tokens": ""})
    image = next(iter((data / "eval" / "vizwiz" / "test").iterdir()))
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ItemError, match=r"llava_test\.jsonl, line \d: .* is no whole image .*; fetch it again"):
        run_spec(spec, here)
    image.write_bytes(whole[:-12])  # it can be opened without its end
    assert run_spec(spec, here) == "complete"


def test_two_questions_of_one_name_are_refused_where_a_server_scores_them(paths: Paths, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    file = data / "eval" / "vizwiz" / "llava_test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"question_id": "0"}) + "\n" for line in lines))
    here = Paths(tmp_path / "results", data, paths.model_dir)
    with pytest.raises(ItemError, match=r"llava_test\.jsonl, line 2: its id '0' is that of .*line 1, too; remove one"):
        run_spec(small("lora", data__tasks="vizwiz_test", evaluation__task_new_tokens=""), here)


def test_a_dry_run_counts_what_the_folder_holds(paths: Paths) -> None:
    done = command(paths, "--dry-run", "--only", "method=lora", "--only", "seed=0", small=ADAPTED)
    assert "about 6 steps" in done.stdout, done.stdout + done.stderr  # 12 conversations, two passes, four at a time


def test_what_it_would_cost(paths: Paths) -> None:
    """Shapes by arithmetic are those of real modules; every row has an estimate."""
    shape = shapes.OTHERS[BASE]
    assert shape.trained(ROWS["lora"].method) == 340_795_392 and shape.trained(ROWS["dora"].method) == 342_155_264
    assert shape.parameters() + 342_155_264 - shape.projector == 7_384_078_336 + 2 * 4096  # with <image>
    assert shape.parameters() - shape.trained(ROWS["ft"].method) == shape.tower
    assert paths.model_dir is not None
    model, _ = open_llava(paths.model_dir)
    tiny = shapes.of_folder(paths.model_dir)
    assert tiny.parameters() == sum(weight.numel() for weight in model.parameters())
    for name in ROWS:
        spec = small(name)
        assert tiny.trained(spec.method) == inject(open_llava(paths.model_dir)[0], spec.method, 0)["trainable"]
    told = [*planning.lines(specs("paper"), ITEMS, None, None, None, Runtime(recompute=True))]
    assert sum("EFLOP" in line for line in told) == 9 + 1 and told[0].count("about 5198 steps") == 1
    one, other = (cost.estimate(ROWS["lora"], shape, 1280, 0, recompute=flag) for flag in (False, True))
    assert other.memory_bytes < 0.6 * one.memory_bytes and 1.4 < other.train_flops / one.train_flops < 1.5


def test_over_two_processes_as_over_one(paths: Paths, tmp_path: Path) -> None:
    """torchrun with whole weights (DDP), and with shares of them (FSDP2): the same losses and answers.

    Steps without images leave the projector without a gradient, in every process.
    """
    few = ADAPTED | {"method.dropout": 0.0, "data.tasks": "pope,science_qa,vizwiz_test", "optim.products": "own"}
    few |= {"evaluation.task_new_tokens": "science_qa=6", "optim.learning_rate": 0.002}
    chosen = ["--only", "method=dora", "--only", "seed=0"]
    for name, launch, more in (("one", (), []), ("two", TWO, []), ("shares", TWO, ["--shard", "--recompute"])):
        here = Paths(tmp_path / name, paths.data_dir, paths.model_dir)
        done = command(here, *chosen, *more, small=few, launch=launch)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("1 runs: 1 complete") == 1
    runs = {name: next(iter_runs(tmp_path / name)) for name in ("one", "two", "shares")}
    told = {name: (record["processes"], record["sharded"]) for name, (_, record) in runs.items()}
    assert told == {"one": (1, False), "two": (2, False), "shares": (2, True)}
    found = {
        name: {stream: read_rows(path, stream) for stream in ("metrics", "eval")} for name, (path, _) in runs.items()
    }
    one = found["one"]
    adapters = {name: load_file(path / "adapter" / "adapter_model.safetensors") for name, (path, _) in runs.items()}
    for name in ("two", "shares"):
        assert len(found[name]["metrics"]) == len(one["metrics"]) == 6
        for column in ("loss", "grad_norm", "learning_rate"):
            assert [row[column] for row in found[name]["metrics"]] == pytest.approx(
                [row[column] for row in one["metrics"]], rel=1e-4
            )
        for mine, other in zip(found[name]["eval"], one["eval"], strict=True):
            assert (mine["task"], mine["prompt_sha256"]) == (other["task"], other["prompt_sha256"])
            assert mine["value"] == other["value"] and mine["rules"] == other["rules"]
        for task in ("pope", "science_qa", "vizwiz_test"):
            texts = [(runs[run][0] / "samples" / f"{task}.generate.jsonl").read_text() for run in ("one", name)]
            assert texts[0] == texts[1]
        for key, tensor in adapters["one"].items():
            torch.testing.assert_close(adapters[name][key], tensor, rtol=1e-3, atol=2e-5, msg=key)


def test_its_table_is_the_papers_form(paths: Paths, tmp_path: Path) -> None:
    here = Paths(tmp_path, paths.data_dir, paths.model_dir)
    for spec in (small("dora"), small("dora", seed=1), small("ft")):
        run_spec(spec, here)
    assert {file.suffix for file in table.build(tmp_path)} == {".md", ".csv", ".tex"}
    text = (tmp_path / "tables" / "visual_instruction.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    heads = [line for line in lines if line[0] == "Method"]
    assert len(heads) == 2 and heads[1][3:] == ["VQAv2", "GQA", "VisWiz", "SQA", "VQAT", "POPE", "MMBench", "Average"]
    assert [head for head in heads[0] if head in heads[1]] == heads[1]  # the paper's columns in its order
    named = [line for line in lines if line[0].startswith(("DoRA", "FT"))]
    ours, theirs = ([dict(zip(h, line, strict=True)) for line in named if len(line) == len(h)] for h in heads)
    assert [row["VQAv2"] for row in theirs] == ["78.5", "78.6"]
    by_method = {row["Method"].split()[0]: row for row in ours}  # not the declared rank: "DoRA r=4"
    assert by_method["DoRA"]["Seeds"] == "2" and by_method["FT"]["Seeds"] == "1"
    told = [row for spec in (small("dora"), small("dora", seed=1)) for row in rows(here, spec)]
    values = [row["value"] for row in told if row["task"] == "pope"]
    assert by_method["DoRA"]["POPE"].split("±")[0].strip() == f"{50 * sum(values):.1f}"
    for row in ours:  # their servers have the answers
        assert {row["VQAv2"], row["VisWiz"], row["Average"]} == {"–"}
    assert table.build(tmp_path / "empty") == []
