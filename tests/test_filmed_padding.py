"""Zeros behind a short clip (data.padding): masked they are as if not there, read they are frames of zeros."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filmed import SHAPE, save_clips
from pictured import save_bart
from test_filmed_run import SENTENCES, small
from test_pictured_processes import HOUSE

from analysis.tables import video_text as table
from dora_lab.forms import vl_bart
from dora_lab.forms.vl_bart import VLBartForm
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.models.base import model_and_tokenizer
from dora_lab.report.card import card
from dora_lab.runs.record import run_path
from dora_lab.runs.streams import read_rows
from dora_lab.spec import canonical_json, spec_id
from dora_lab.tasks import sources
from dora_lab.tasks.limits import limits

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 4  # of the short clip; SHAPE[0] are read
SHORT, LONG = "100", "103"  # items of tvc_val: a clip of 4 frames, one of 7; texts of several lengths
ONE_TASK = {"data__tasks": "yc2c,yc2c_val", "optim__task_batch_sizes": "yc2c=4", "evaluation__task_beams": ""}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    where = tmp_path_factory.mktemp("padding")
    return Paths(where / "results", save_clips(where / "data"), save_bart(where / "bart", SENTENCES))


@pytest.fixture(scope="module")
def opened(paths: Paths) -> Any:
    model, tokenizer = model_and_tokenizer(small("FT"), paths.model_dir)
    return model.eval(), tokenizer


def asked(opened: Any, data_dir: Path | None, *ids: str, padding: str, frames: int = SHAPE[0]) -> tuple[Any, list[Any]]:
    """The form of a run that reads so many frames, and these items as it encodes them."""
    model, tokenizer = opened
    spec = small("FT", data__padding=padding, data__feature_shape=f"{frames},{SHAPE[1]}")
    items = sources.items(spec, data_dir)
    assert items.pictures is not None
    form = VLBartForm.of(spec, model, tokenizer, items.pictures)
    pool = [item for name in ids for item in items.test["tvc_val"] if item["id"] == name]
    return form, form.encode({"tvc_val": pool}, spec.data, tokenizer, limits(model)).examples


def seen(opened: Any, form: Any, examples: list[Any]) -> dict[str, Any]:
    """What the model makes of the first example: hidden states of its text and of the frames that it has, how likely
    its captions are, what it writes, and the gradient of their loss."""
    model, tokenizer = opened
    inputs = form.inputs(examples)
    text, width = int(inputs["attention_mask"][0, : -form.pictures.features_NRF.shape[1]].sum()), FRAMES
    hidden = model.get_encoder()(**inputs).last_hidden_state[0].detach()
    at = inputs["input_ids"].shape[1]
    batch = form.batch(examples, [(example.best[0], 1.0) for example in examples])
    model.zero_grad()
    vl_bart.token_nll(model, batch)[0].sum().backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    how = vl_bart.settings(small("FT", evaluation__num_beams="2"), "tvc_val", form, tokenizer)
    return {
        "hidden": torch.cat([hidden[:text], hidden[at : at + width]]),
        "nll": vl_bart.nll(model, form, examples)[0],
        "written": vl_bart.texts(model, form, tokenizer, how, examples)[0],
        "visual": grads["model.encoder.visual_embedding.feature.0.weight"],
        "decoder": grads["model.decoder.layers.0.encoder_attn.k_proj.weight"],
    }


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, bool]:
    return {
        name: value == theirs[name] if isinstance(value, str) else bool(np.allclose(value, theirs[name], atol=2e-6))
        for name, value in ours.items()
    }


def test_masked_a_short_clip_is_what_it_is_without_zeros(opened: Any, paths: Paths) -> None:
    bare = seen(opened, *asked(opened, paths.data_dir, SHORT, padding="read", frames=FRAMES))
    masked = seen(opened, *asked(opened, paths.data_dir, SHORT, padding="masked"))
    assert all(close(masked, bare).values())
    beside = seen(opened, *asked(opened, paths.data_dir, SHORT, LONG, padding="masked"))
    assert all(close(beside, bare).values())  # whoever stands beside it
    read = close(seen(opened, *asked(opened, paths.data_dir, SHORT, padding="read")), bare)
    assert not any(same for name, same in read.items() if name != "written")


def test_read_they_are_frames_of_zeros(opened: Any, paths: Paths, tmp_path: Path) -> None:
    """The same clip, its zeros written into its file, where no padding masks them."""
    data = save_clips(tmp_path)
    (file,) = (data / "video" / "vis_features" / "tv" / "clip-vit").glob("val_000.npz")
    with np.load(file) as held:
        features = held["features"]
    assert features.shape == (FRAMES, SHAPE[1])
    np.savez(file, features=np.concatenate([features, np.zeros((SHAPE[0] - FRAMES, SHAPE[1]), np.float16)]))
    read = seen(opened, *asked(opened, paths.data_dir, SHORT, padding="read"))
    for padding in ("read", "masked"):
        assert all(close(seen(opened, *asked(opened, data, SHORT, padding=padding)), read).values())


def test_what_is_masked_is_said_of_each_clip(opened: Any, paths: Paths) -> None:
    for padding, short in (("read", [1] * 6), ("masked", [1] * 4 + [0] * 2)):
        form, examples = asked(opened, paths.data_dir, SHORT, LONG, padding=padding)
        mask = form.inputs(examples)["attention_mask"]
        assert mask[:, -SHAPE[0] :].tolist() == [short, [1] * 6]
        assert mask[:, : -SHAPE[0]].sum(1).tolist() == [len(example.ids) for example in examples]
        assert form.pictures.padded(examples[0].pictures).tolist() == [[False] * 4 + [True] * 2]  # whatever is masked


def test_a_run_with_masked_padding_is_another_one_with_a_name_of_its_own(paths: Paths) -> None:
    spec, masked = small("DoRA", **ONE_TASK), small("DoRA", data__padding="masked", **ONE_TASK)
    assert small("DoRA", data__padding="read", **ONE_TASK) == spec and spec_id(masked) != spec_id(spec)
    assert "padding" not in canonical_json(spec)  # ids from before the field stay
    assert run_spec(spec, paths) == run_spec(masked, paths) == "complete"
    first, second = ([row["loss"] for row in read_rows(run_path(paths.results, s), "metrics")] for s in (spec, masked))
    assert first[0] != second[0]
    said = {padding: f"zeros behind clips: {padding}" for padding in ("read", "masked")}
    assert said["masked"] in card(run_path(paths.results, masked))
    assert said["masked"] not in card(run_path(paths.results, spec))
    evals = table.frame(paths.results, table.EXPERIMENT)
    assert evals["label"].nunique() == 2 and evals.groupby("label")["spec_id"].nunique().eq(1).all()


def test_the_command_takes_it_and_refuses_what_it_is_not() -> None:
    for experiment, padding, words in (
        ("video_text", "masked", "1 specs"),
        ("video_text", "maskd", "data.padding = 'maskd': expected one of 'read', 'masked'"),
        ("image_text", "masked", "data.padding = 'masked': must be read but with data.name value"),
        ("commonsense", "masked", "must be one that reads data.padding"),
    ):
        only = ["--only", "method=dora", "--only", "seed=0", "--with", f"data.padding={padding}"]
        asked = [sys.executable, "-m", "dora_lab", "run", experiment, "--tier", "paper", "--dry-run", *only]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=HOUSE)
        assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert (done.returncode == 0) == ((experiment, padding) == ("video_text", "masked"))
