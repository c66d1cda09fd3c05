"""Fuzzing: what is read from files is either read as it was written, or refused by one of our errors.

A target takes an empty folder and a hypothesis `draw`, makes one damaged or random input, reads it, and returns "read"
or "refused". It raises AssertionError for a value that is not the one that was written, and lets every error pass that
is not ours: that is the bug being looked for.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dora_lab import report, spec
from dora_lab.formats.manifest import read_manifest
from dora_lab.formats.read import read_adapter
from dora_lab.formats.shards import Shards
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.io.files import header, parse_json
from dora_lab.metrics import score
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import read_record
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import survey
from dora_lab.spec import SpecError
from dora_lab.tasks import ItemError, frames, load_task, read_items
from tests import filmed
from tests.faults._models import copy, header_of, write_header
from tests.tiny import boolq_items, make_spec

Draw = Callable[[Any], Any]
Target = Callable[[Path, Draw], str]
TARGETS: dict[str, Target] = {}
SLOW = 10.0  # seconds after which one case counts as a hang

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, -1, 0, 2**63, "../x", "a\0b", "\ud800", "none", "nan", 1e308, "[" * 50]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def target(name: str) -> Callable[[Target], Target]:
    """Decorator: put the function into TARGETS."""

    def register(function: Target) -> Target:
        TARGETS[name] = function
        return function

    return register


def run(name: str, cases: int, start: int) -> Counter[str]:
    """`cases` cases of a target, from a seed; returns how they ended. Raises what a case raises, made small."""
    ends: Counter[str] = Counter()

    @seed(start)
    @settings(max_examples=cases, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(data=st.data())
    def check(data: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            ends[TARGETS[name](Path(folder), data.draw)] += 1
            assert time.monotonic() - begun < SLOW, "it hangs"

    check()
    return ends


def campaign(name: str, cases: int, start: int) -> dict[str, Any]:
    """The row of a campaign's file for one target."""
    begun, error = time.monotonic(), None
    ends: Counter[str] = Counter()
    try:
        ends = run(name, cases, start)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    total = ends.total()
    sees = f"{ends['read']} read as written, {ends['refused']} refused by name" if error is None else None
    return {
        "kind": "fuzz", "number": "fuzz", "name": name, "times": total + (error is not None), "survived": total,
        "sees": sees, "messages": 0, "error": error, "skipped": None, "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def _damaged(draw: Draw, content: bytes) -> bytes:
    """Bytes changed, put in, taken out, swapped, cut off or doubled, in one to three places."""
    new = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(new) - 1)))
        piece = draw(
            st.binary(min_size=1, max_size=4) | st.sampled_from([b"NaN", b"1e999", b"\n", b'"', b"{", b"9" * 400])
        )
        kind = draw(st.sampled_from(["over", "in", "out", "cut", "double"]))
        if kind == "over":
            new[at : at + len(piece)] = piece
        elif kind == "in":
            new[at:at] = piece
        elif kind == "out":
            del new[at : at + len(piece)]
        elif kind == "cut":
            del new[at:]
        else:
            new += new[at:]
    return bytes(new)


def _changed(draw: Draw, tree: Any) -> Any:
    """A JSON value with one of its parts, at any depth, replaced, dropped or renamed."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        kind = draw(st.sampled_from(["deeper", "deeper", "drop", "rename", "new"]))
        rest = {name: value for name, value in tree.items() if name != key}
        return {
            "deeper": lambda: {**tree, key: _changed(draw, tree[key])},
            "drop": lambda: rest,
            "rename": lambda: {**rest, draw(st.text(max_size=6)): tree[key]},
            "new": lambda: {**tree, draw(st.text(max_size=6)): draw(JSON)},
        }[kind]()
    if isinstance(tree, list) and tree and draw(st.booleans()):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], _changed(draw, tree[at]), *tree[at + 1 :]]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and draw(st.booleans()):
        return tree + draw(st.sampled_from([0, 1, -1, 0.5]))  # of the right type, and another value
    return draw(JSON)


@target("spec: from_dict, validate, spec_id")
def _spec(folder: Path, draw: Draw) -> str:
    values = _changed(draw, spec.to_dict(make_spec()))
    try:
        found = spec.from_dict(values)
        again = spec.from_dict(json.loads(json.dumps(spec.to_dict(found))))
        assert again == found and spec.spec_id(again) == spec.spec_id(found)
        defaults = spec.to_dict(found)
        for key, value in values.items():  # what was given is what is there
            assert _same(defaults[key], value), (key, value, defaults[key])
        spec.validate(found)
    except SpecError:
        return "refused"
    return "read"


def _same(ours: Any, given: Any) -> bool:
    if isinstance(given, dict) and isinstance(ours, dict):
        return all(_same(ours[key], value) for key, value in given.items())
    return ours == given


def _run_of(folder: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    rows = {
        "metrics": [{"step": n, "tokens": 9 * n, "loss": 1 / n, "grad_norm": 1.5} for n in (1, 2)],
        "probe": [{"step": 2, "fraction": 1.0, "module": "0.q_proj", "layer": 0, "kind": "q_proj", "delta_m": 0.25,
                   "delta_d": 0.125, "relative_change": 0.5}],
        "eval": [{"task": "boolq", "protocol": "generate", "metric": "accuracy", "value": 0.75, "n": 4,
                  "n_unparsed": 0, "chance": 0.5, "majority": 0.5, "prompt_sha256": "0", "correct": "1011"}],
    }  # fmt: skip
    with RunDir.open(folder, make_spec()) as run:
        for name, given in rows.items():
            for row in given:
                run.append(name, row)
        run.record(params={"trainable": 3, "total": 7}, seconds={"train": 1.5})
        run.finish("complete")
    return run.path, rows


@target("record.json: damaged bytes or fields, read into a frame")
def _record(folder: Path, draw: Draw) -> str:
    path, _ = _run_of(folder)
    file = path / "record.json"
    before = read_record(path)
    if draw(st.booleans()):
        file.write_bytes(_damaged(draw, file.read_bytes()))
    else:
        file.write_text(json.dumps(_changed(draw, before)), encoding="utf-8", errors="replace")
    try:
        record = read_record(path)
        frame = report.frame(folder, stream="record")
    except StoreError:
        return "refused"
    if any(str(path) in lost.why for lost in survey(folder).left_out):
        return "refused"  # a hash in it is another, so a stream is not what it says
    assert spec.spec_id(spec.from_dict(record["spec"])) == record["spec_id"]
    assert record["status"] != "complete" or len(frame) == 1
    return "read"


@target("jsonl streams: damaged bytes, read as rows, into frames and scores")
def _stream(folder: Path, draw: Draw) -> str:
    path, rows = _run_of(folder)
    name = draw(st.sampled_from(sorted(rows)))
    file = path / f"{name}.jsonl"
    before = file.read_bytes()
    if loose := draw(st.integers(0, 3)) > 0:  # a record from before there were hashes of streams
        record = read_record(path)
        del record["streams"]
        (path / "record.json").write_text(json.dumps(record))
    if draw(st.booleans()):
        file.write_bytes(_damaged(draw, file.read_bytes()))
    else:
        lines = [json.dumps(_changed(draw, row)) for row in rows[name]]
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
    try:
        found = read_rows(path, name)
        frame = report.frame(folder, stream=name)
        if name == "eval":
            report.scores(frame)
    except StoreError:
        return "refused"
    assert len(frame) == len(found)
    assert loose or file.read_bytes() == before
    for row in found if name == "eval" else ():  # a score is what its answers say
        text = row.get("correct")
        assert not isinstance(text, str) or row["metric"] != "accuracy" or row["value"] * row["n"] == text.count("1")
    return "read"


@target("adapter_config.json: damaged bytes or fields")
def _configuration(folder: Path, draw: Draw) -> str:
    saved = copy("adapter", folder)
    file = saved / "adapter_config.json"
    if draw(st.booleans()):
        file.write_bytes(_damaged(draw, file.read_bytes()))
    else:
        changed = _changed(draw, json.loads(file.read_text()))
        file.write_text(json.dumps(changed), encoding="utf-8", errors="replace")
    with_manifest = draw(st.booleans())
    try:
        if with_manifest:
            read_manifest(saved)
        adapter = read_adapter(saved)
    except CheckpointError:
        return "refused"
    assert len(adapter.layers) == 4 and all(layer.scaling > 0 for layer in adapter.layers.values())
    return "read"


@target("safetensors: damaged header or payload of an adapter with its manifest, and without")
def _safetensors(folder: Path, draw: Draw) -> str:
    saved = copy("adapter", folder)
    file = saved / "adapter_model.safetensors"
    before = file.read_bytes()
    table, payload = header_of(file)
    if draw(st.booleans()):
        file.write_bytes(_damaged(draw, before))
    else:
        write_header(file, json.dumps(_changed(draw, table), ensure_ascii=True), payload)
    try:
        there = header(file)
        adapter = read_adapter(saved)
        assert {len(layer.magnitude) for layer in adapter.layers.values() if layer.magnitude is not None} == {16}
        assert len(there) == 12 and len(adapter.layers) == 4
        read_manifest(saved)
    except CheckpointError:
        return "refused"
    assert file.read_bytes() == before
    return "read"


@target("model.safetensors.index.json: damaged bytes or fields")
def _index(folder: Path, draw: Draw) -> str:
    saved = copy("base", folder)
    names = [name for name in header_of(saved / "model.safetensors")[0] if name != "__metadata__"]
    shard = "model-00001-of-00001.safetensors"  # beside a single file no index is read
    (saved / "model.safetensors").rename(saved / shard)
    table = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    file = saved / "model.safetensors.index.json"
    content = json.dumps(table).encode()
    if draw(st.booleans()):
        content = _damaged(draw, content)
    else:
        content = json.dumps(_changed(draw, table)).encode(errors="replace")
    file.write_bytes(content)
    try:
        found = Shards(saved)
    except CheckpointError:
        return "refused"
    assert set(found) <= set(names)
    return "read"


@target("task files: damaged bytes or fields of items")
def _items(folder: Path, draw: Draw) -> str:
    items = boolq_items(3)
    file = folder / "test.json"
    if draw(st.booleans()):
        file.write_bytes(_damaged(draw, json.dumps(items).encode()))
    else:
        file.write_text(json.dumps(_changed(draw, items)), encoding="utf-8", errors="replace")
    task = load_task("boolq")
    try:
        found = read_items(file, task)
    except ItemError:
        return "refused"
    for item in found:  # what is read can be asked and scored
        assert item["answer"] in task.options(item) and task.parse(item["output"]) == item["answer"]
    return "read"


@target("lines about clips: damaged bytes or fields of annotations and subtitles")
def _lines(folder: Path, draw: Draw) -> str:
    files = filmed.annotations()
    harmed = draw(st.sampled_from(sorted(files)))
    for name, rows in files.items():
        file = folder / "ann" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in (rows if "subtitles" in name else rows[:3])]
        if name == harmed and (fields := draw(st.booleans())):
            lines[1] = json.dumps(_changed(draw, rows[1]))
        content = "".join(f"{line}\n" for line in lines).encode()
        file.write_bytes(_damaged(draw, content) if name == harmed and not fields else content)
    try:
        learnt, asked = (
            {name: task.read(folder, split) for name in names if (task := load_task(name)).read is not None}
            for names, split in ((filmed.LEARNT, "train"), (filmed.ASKED, "test"))
        )
    except ItemError:
        return "refused"
    for name, items in asked.items():  # what is read can be scored and learnt
        for metric in load_task(name).metrics:
            found = score(metric, items, {item["id"]: item["best"][0] for item in items}, name)
            assert found.n_unread == 0 and all(value > 0 for value in found.values)
    assert all(item["targets"] and item["pictures"][0][1] for items in learnt.values() for item in items)
    return "read"


@target("npz of a clip's frames: damaged bytes, packed or not")
def _npz(folder: Path, draw: Draw) -> str:
    file = folder / "vis_features" / "tv" / frames.VARIANT / "clip.npz"
    file.parent.mkdir(parents=True)
    before = np.arange(20, dtype=draw(st.sampled_from([np.float16, np.float32]))).reshape(4, 5)
    (np.savez_compressed if draw(st.booleans()) else np.savez)(file, features=before)
    file.write_bytes(_damaged(draw, file.read_bytes()))
    try:
        ((_, found),) = frames.gather(folder, "tv", ["clip"], 5)
    except LoadError:
        return "refused"
    assert np.array_equal(found, before)
    return "read"


@target("JSON texts: a value that Python writes is read back the same; everything else is a ValueError")
def _json(folder: Path, draw: Draw) -> str:
    value = draw(JSON)
    text = json.dumps(value)
    if draw(st.booleans()):
        text = _damaged(draw, text.encode()).decode("latin-1")
    try:
        found = parse_json(text)
    except ValueError:
        return "refused"
    assert found == json.loads(text)
    return "read"
