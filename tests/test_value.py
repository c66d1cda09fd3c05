"""VALUE's tasks about clips: what is read of their files, features to the bit, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filmed import ASKED, COLOURS, LEARNT, SETS, SHAPE, clip, frames_of, save_clips

from dora_lab.io.errors import LoadError
from dora_lab.metrics import score
from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Spec
from dora_lab.tasks import ItemError, load_task, pictures, sources, value
from dora_lab.tasks.frames import gather, resized
from dora_lab.tasks.pictures import gather_clips


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips(tmp_path_factory.mktemp("data"))


def read(root: Path, task: str, split: str) -> list[dict[str, Any]]:
    reader = load_task(task).read
    assert reader is not None
    return reader(root / "video", split)


def spec(**changes: Any) -> Spec:
    return Spec(
        experiment="tiny", tier="mini", seed=0, model=Model(name="tiny", family="vl_bart"),
        data=Data(**({"name": "value", "tasks": (*LEARNT, *ASKED), "feature_shape": SHAPE} | changes)),
        method=Method(name="ft"),
        optim=Optim(learning_rate=1e-3, warmup_steps=0, batch_size=4, micro_batch_size=4, epochs=1.0,
                    task_batch_sizes=tuple(f"{task}=4" for task in LEARNT)),
        probe=None, evaluation=Evaluation(),
    )  # fmt: skip


def test_what_is_learnt_is_never_asked_and_what_is_asked_is_validation_by_its_name(root: Path) -> None:
    counts = {
        task: [len(read(root, task, split)) for split in ("train", "validation", "test")] for task in LEARNT + ASKED
    }
    assert counts == {
        "tvqa": [12, 0, 0], "how2qa": [12, 0, 0], "tvc": [24, 0, 0], "yc2c": [12, 0, 0],
        "tvqa_val": [0, 0, 6], "how2qa_val": [0, 0, 6], "tvc_val": [0, 0, 6], "yc2c_val": [0, 0, 6],
    }  # fmt: skip
    assert [load_task(task).column for task in ASKED] == ["TVQA val", "How2QA val", "TVC val", "YC2C val"]
    assert [load_task(task).chance for task in ("tvqa_val", "how2qa_val")] == [1 / 5, 1 / 4]


# byte for byte as the released code writes them, and with --with data.template=clean
PROMPTS = {
    "tvqa_val": (
        "[Subs] ann talks. bob talks. [Q] what colour? [TS] (0.5-2.25) "
        "[Choices] a0: red. a1: blue. a2: green. a3: grey. a4: .",
        "tvqa: ",
    ),
    "how2qa_val": (
        "[Subs] ann talks. bob talks. [Q] what colour? [TS] ([0, 2.5]) "
        "[Choices] a0: red. a1: blue. a2: green. a3: grey.",
        "how2qa: ",
    ),
    "tvc_val": ("[Subs] ann talks. bob talks. [TS] ([0.0, 2.5])", "tvc: "),
    "yc2c_val": ("[Subs] ann talks. bob talks.", "yc2c: "),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_byte_for_byte(name: str, root: Path) -> None:
    text, word = PROMPTS[name]
    for task, split in ((load_task(name), "test"), (load_task(name.removesuffix("_val")), "train")):
        assert task.read is not None
        item = next(item for item in task.read(root / "video", split) if item["pictures"][0][1].endswith("002"))
        assert item["text"] == text
        asked = {template: task.asked(template, item["text"]) for template in ("published", "bare", "clean")}
        assert asked == {"published": f"{text} {word}", "bare": f"{text} ", "clean": word + text}
        if "qa" in name:
            assert item["question"] == text[: text.index(" [TS]")]
    silent = read(root, name, "test")[0]["text"]  # nothing is said in this clip
    assert silent.startswith("[Subs] ") and silent[7:8] in ("", " ")


def test_what_an_item_is(root: Path) -> None:
    first = read(root, "tvqa_val", "test")[1]
    assert first["id"] == "1001" and first["pictures"] == (("tv", clip("val", 1)),)
    assert (first["targets"], first["best"], first["answer"]) == ({"a1": 1.0}, ["a1"], "a1")
    assert first["labels"] == ["a0", "a1", "a2", "a3", "a4"]
    assert read(root, "how2qa", "train")[2]["pictures"] == (("how2", clip("train", 2)),)
    one, two = read(root, "tvc", "train")[2:4]
    assert (one["id"], two["id"]) == ("1#0", "1#1") and one["targets"] == {"a blue thing here.": 1.0}
    assert {load_task(f"{task}_val").metrics for task in ("tvc", "yc2c")} == {("cider_d_ascii", "cider_d")}
    asked = read(root, "tvc_val", "test")[1]
    assert two["best"] == ["a blue ring here. "]  # learnt as it stands
    assert asked["references"] == ["a blue thing here.", "a blue ring here."] and asked["targets"] == {}


def test_a_cloze_question_has_no_list_and_its_answer_is_words(root: Path, tmp_path: Path) -> None:
    (item,) = [item for item in read(root, "tvqa_cloze_val", "test") if item["id"] == "1002"]
    asked = next(item for item in read(root, "tvqa_val", "test") if item["id"] == "1002")
    assert item["text"] == PROMPTS["tvqa_val"][0].partition(" [Choices]")[0]
    assert item["labels"] == ["red", "blue", "green", "grey", ""] and item["targets"] == {item["answer"]: 1.0}
    assert item["best"] == [item["answer"]] == [item["labels"][int(asked["answer"][1])]]
    assert load_task("tvqa_cloze").prompt == "tvqa: " and load_task("tvqa_cloze_val").chance is None
    shutil.copytree(root / "video" / "ann", tmp_path / "ann")
    file = tmp_path / "ann" / "tvqa" / "tvqa_val.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(first | {"answer_idx": 4, "a4": ". "}) + "\n")
    assert len(load_task("tvqa_val").read(tmp_path, "test")) == 1
    with pytest.raises(ItemError, match=r"tvqa_val.jsonl.*, field 'a4': expected words, as it is the right answer"):
        load_task("tvqa_cloze_val").read(tmp_path, "test")


@pytest.mark.parametrize("task", ASKED)
def test_the_metrics_take_the_items_as_they_are_read(task: str, root: Path) -> None:
    items = read(root, task, "test")
    for metric in load_task(task).metrics:
        found = score(metric, items, {item["id"]: item["best"][0] for item in items}, "here")
        mean = sum(found.values) / len(found.values)
        assert mean == 1.0 if "qa" in task else mean > 4
        assert found.n_unread == 0


def test_a_spec_says_which_items_and_clips(root: Path) -> None:
    items = sources.items(spec(), root)
    assert items.counts() == {
        "train": {"tvqa": 12, "how2qa": 12, "tvc": 24, "yc2c": 12},
        "validation": {},
        "test": dict.fromkeys(ASKED, 6),
    }
    assert items.pictures is not None and len(items.pictures.places) == 3 * 18
    for task, pool in (*items.train.items(), *items.test.items()):
        for item in pool:
            ((clips, name),) = item["pictures"]
            assert clips == SETS[task.removesuffix("_val")]
            ours = items.pictures.of(item["pictures"])
            assert ours.shape == (1, *SHAPE) and ours.dtype == np.float32
            assert np.array_equal(ours[0], resized(frames_of(clips, name).astype(np.float32), SHAPE[0]))
    held = sources.items(spec(validation_items=8), root)
    assert held.counts()["validation"] == dict.fromkeys(LEARNT, 2)
    # captions of a clip are items of their own: the other one of each that is held out is not learnt
    assert held.counts()["train"] == {"tvqa": 10, "how2qa": 10, "tvc": 20, "yc2c": 10}
    for task in LEARNT:
        shown = [{(item["pictures"], item["text"]) for item in pools[task]} for pools in (held.train, held.validation)]
        assert not shown[0] & shown[1] and len(shown[1]) == 2
    told = {(source["task"], source["split"]): source for source in items.sources}
    assert told["tvqa_val", "test"]["asked_in_training"] == 0 and told["tvc", "train"]["used"] == 24
    below = sources.data_identity(spec().data, "value", root / "video")
    assert below == sources.data_identity(spec().data, "value", root) and len(below["sha256"]) == 64


@pytest.mark.parametrize(("count", "frames"), [(100, 64), (65, 64), (128, 64), (7, 3)])
def test_more_frames_are_pooled_as_torch_pools(count: int, frames: int) -> None:
    found_NF = np.random.default_rng(0).standard_normal((count, 5)).astype(np.float32)
    theirs = torch.nn.AdaptiveMaxPool1d(frames)(torch.from_numpy(found_NF).T).T.numpy()
    assert np.array_equal(resized(found_NF, frames), theirs)


@pytest.mark.parametrize("frames", [6, 8])
def test_zeros_stand_behind_fewer_frames(frames: int) -> None:
    found_NF = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    ours = resized(found_NF, frames)
    assert np.array_equal(ours[:5], found_NF) and not ours[5:].any() and ours.shape == (frames, 4)
    assert np.array_equal(resized(found_NF, 5), found_NF)


def test_the_hash_is_of_what_the_files_hold(root: Path) -> None:
    keys = [("tv", clip("val", 4)), ("yc2", clip("train", 0))]
    found = gather_clips(root / "video", keys, SHAPE)
    assert found.sha256 == gather_clips(root / "video", keys[::-1], (64, SHAPE[1])).sha256
    assert found.sha256 != gather_clips(root / "video", keys[:1], SHAPE).sha256


def test_the_hash_is_of_the_names_too(tmp_path: Path) -> None:
    folder = save_clips(tmp_path) / "video"
    keys = [("tv", clip("val", 4)), ("tv", clip("val", 5))]
    files = [folder / "vis_features" / "tv" / "clip-vit" / f"{name}.npz" for _, name in keys]
    files[1].write_bytes(files[0].read_bytes())
    of_each = [gather_clips(folder, [key], SHAPE).sha256 for key in keys]
    assert of_each[0] != of_each[1]


def changed(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        path = root / "video" / "ann" / file
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return harm


def put(place: int, field: str, held: Any) -> Callable[[Any], None]:
    return lambda rows: rows[place].__setitem__(field, held)


VAL = "tvqa/tvqa_val.jsonl"
BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no file": (
        "tvqa_val",
        lambda r: (r / "video/ann" / VAL).unlink(),
        r"tvqa_val\.jsonl does not exist; fetch it, or leave its task out of data\.tasks",
    ),
    "an empty file": ("tvqa_val", lambda r: (r / "video/ann" / VAL).write_text(""), r"tvqa_val\.jsonl is empty; fetch"),
    "cut short": (
        "tvqa_val",
        lambda r: (r / "video/ann" / VAL).write_text((r / "video/ann" / VAL).read_text()[:-20]),
        r"tvqa_val\.jsonl, line 6: broken or truncated JSON \(",
    ),
    "a key twice": (
        "tvqa_val",
        lambda r: (r / "video/ann" / VAL).write_text('{"qid": 1, "qid": 2}\n'),
        r"tvqa_val\.jsonl, line 1: .*qid",
    ),
    "no object": (
        "tvqa_val",
        lambda r: (r / "video/ann" / VAL).write_text("[1]\n"),
        "line 1: expected an object, got a JSON list",
    ),
    "no subtitles": ("tvc_val", changed("tv_subtitles.jsonl", lambda rows: rows.pop(14)),
                     r"tvc_val_release\.jsonl, line 3: its clip 'val_002' is not in .*tv_subtitles\.jsonl; fetch both"),
    "a clip twice": ("yc2c_val", changed("yc2_subtitles.jsonl", lambda rows: rows.append(rows[0])),
                     r"yc2_subtitles\.jsonl, line 19: clip 'train_000' is there already"),
    "subtitles that are no list": ("yc2c_val", changed("yc2_subtitles.jsonl", put(3, "sub", None)),
                                   r"yc2_subtitles\.jsonl, line 4, field 'sub': expected a list of objects, got None"),
    "a subtitle that is no text": ("yc2c_val", changed("yc2_subtitles.jsonl", put(3, "sub", [{"text": 1}])),
                                   r"line 4, sub 0, field 'text': expected a text, got 1"),
    "an answer beyond the choices": ("how2qa_val", changed("how2qa/how2qa_val_release.jsonl", put(2, "answer_idx", 4)),
                                     r"line 3, field 'answer_idx': expected a whole number from 0 to 3, got 4"),
    "no answer": ("tvqa_val", changed(VAL, lambda rows: rows[1].pop("answer_idx")),
                  r"tvqa_val\.jsonl, line 2, field 'answer_idx': expected a whole number from 0 to 4, it is missing"),
    "true for an answer": ("tvqa_val", changed(VAL, put(1, "answer_idx", True)), "field 'answer_idx'.*got True"),
    "a choice that is missing": ("tvqa_val", changed(VAL, lambda rows: rows[1].pop("a4")), "line 2, field 'a4'"),
    "no question": ("tvqa_val", changed(VAL, put(1, "q", " ")), "line 2, field 'q': expected a text, got ' '"),
    "half a character": ("tvqa_val", changed(VAL, put(1, "a3", "\ud800")), "line 2, field 'a3': expected a text"),
    "no span": ("tvc_val", changed("tvc/tvc_val_release.jsonl", put(0, "ts", [1.0])),
                "line 1, field 'ts': expected a text, or two numbers, got"),
    "a span of words": ("tvqa_val", changed(VAL, put(0, "ts", [1.0, "2"])), "line 1, field 'ts': expected a text, or"),
    "no caption": ("yc2c_val", changed("yc2c/yc2c_val_release.jsonl", lambda rows: rows[4].pop("descs")),
                   r"line 5, field 'descs': expected a list of objects, it is missing"),
    "captions that are none": ("tvc", changed("tvc/tvc_train_release.jsonl", put(4, "descs", [])),
                               r"train_release\.jsonl, line 5, field 'descs': expected a list of objects, got \[\]"),
    "an empty caption": ("tvc_val", changed("tvc/tvc_val_release.jsonl", put(4, "descs", [{"desc": ""}])),
                         r"line 5, descs 0, field 'desc': expected a text, got ''"),
    "an id twice": ("tvc_val", changed("tvc/tvc_val_release.jsonl", lambda rows: rows.append(rows[0])),
                    r"line 7: its id '100' is that of .*tvc_val_release\.jsonl, line 1; remove one"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_annotations_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    save_clips(tmp_path)
    task, harm, words = BROKEN[kind]
    harm(tmp_path)
    with pytest.raises(ItemError, match=words) as caught:
        read(tmp_path, task, "train" if task == "tvc" else "test")
    assert "\n" not in str(caught.value)


def saved(held: Any, name: str = "features") -> Callable[[Path], None]:
    return lambda file: np.savez(file, **{name: held})


def damaged(file: Path, deflated: bool) -> None:
    """A compressed file whose stream begins with what is no block, or whose two headers name a method of nobody's."""
    np.savez_compressed(file, features=np.zeros((8, 5), np.float32))
    content = bytearray(file.read_bytes())
    if deflated:
        content[30 + len("features.npy") + content[28]] = 0xFF  # behind the member's header: its name, what is beside
    else:
        content[8] = content[content.index(b"PK\1\2") + 10] = 77
    file.write_bytes(content)


def vast(file: Path) -> None:
    """A whole zip whose array says that it has 9e14 frames."""
    np.save(plain := file.with_suffix(".npy"), np.zeros((9, 5), np.float32))
    content = plain.read_bytes().replace(b"(9, 5), }" + b" " * 14, b"(9" + b"0" * 14 + b", 5), }")
    with zipfile.ZipFile(file, "w") as held:
        held.writestr("features.npy", content)


FEATURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (
        Path.unlink,
        r"clip-vit: 1 of the clips asked for are not there, the first is 'val_004' \(val_004\.npz",
    ),
    "no npz": (lambda file: file.write_bytes(b"no zip"), r"val_004\.npz: the features of 'val_004' cannot be read \("),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:150]), "cannot be read"),
    "an empty file": (lambda file: file.write_bytes(b""), "cannot be read"),
    "a zip of something else": (lambda file: zipfile.ZipFile(file, "w").writestr("features", "x"), "cannot be read"),
    "a pickle": (saved(np.array([{"a": 1}], object)), "cannot be read"),
    "damaged in what is packed": (lambda file: damaged(file, deflated=True), r"cannot be read \(error: .*invalid"),
    "of another packing": (lambda file: damaged(file, deflated=False), r"cannot be read \(NotImplementedError: "),
    "larger than any memory": (lambda file: vast(file), r"cannot be read \(\w*MemoryError: "),
    "another array": (saved(np.zeros((3, 5), np.float16), "feature"), r"cannot be read \(.*features"),
    "another width": (saved(np.zeros((3, 4), np.float16)), r"are \(3, 4\) in float16, expected \(frames, 5\) in"),
    "another type": (saved(np.zeros((3, 5), np.int64)), r"are \(3, 5\) in int64, expected \(frames, 5\) in float16 or"),
    "no frames": (saved(np.zeros((0, 5), np.float16)), r"are \(0, 5\) in float16"),
    "a frame alone": (saved(np.zeros(5, np.float16)), r"are \(5,\) in float16"),
    "no number": (saved(np.full((3, 5), np.nan, np.float32)), "hold numbers that are not finite; fetch it again"),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_what_is_wrong_with_features_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    save_clips(tmp_path)
    harm, words = FEATURES[kind]
    harm(tmp_path / "video" / "vis_features" / "how2" / "clip-vit" / "val_004.npz")
    with pytest.raises(LoadError, match=words) as caught:
        sources.items(spec(), tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_had_is_said_in_one_line(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, folder, words in (
        ({"sha256": "b" * 64}, root, "the spec asks for bbbbbbbbbbbb"),
        ({"features_sha256": "c" * 64}, root, r"have the hash .*, data\.features_sha256 is cccccccccccc"),
        ({"tasks": ("tvqa", "vqa")}, root, r"'vqa' is not in source 'value', whose tasks are how2qa, how2qa_val, tvc"),
        ({"tasks": LEARNT}, root, "data 'value' has no test items for the tasks tvqa, how2qa, tvc, yc2c"),
        ({}, tmp_path / "none", "none: no such folder"),
        ({}, None, "data 'value' is a local folder, VALUE's release: give it with --data-dir"),
    ):
        with pytest.raises(LoadError, match=words) as caught:
            sources.items(spec(**changes), folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(LoadError, match=r"no annotations \(ann/\*\*/\*\.jsonl\); give VALUE's release"):
        value.hash_annotations(tmp_path)
    with pytest.raises(LoadError, match="names a file outside its folder"):
        list(gather(root / "video", "tv", ["../x"], 5))
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda _: Usage(10, 0, 100))
    with pytest.raises(LoadError, match=r"features of 1 clips take 0\.0 GB.*set TMPDIR"):
        gather_clips(root / "video", [("tv", clip("val", 0))], (64, 5))


def test_colours_are_told_apart_by_the_frames() -> None:
    assert [int(np.argmax(frames_of("tv", clip("val", n))[0, :3])) for n in range(3)] == [*range(len(COLOURS))]
