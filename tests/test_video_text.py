"""Experiment video_text: its rows are the paper's, by their settings and by the parameters that they train."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from transformers import BartConfig

from analysis.tables import parameters as table
from dora_lab import paper
from dora_lab.methods.inject import inject
from dora_lab.models.vl_bart import VLBart
from dora_lab.spec import Spec, derive
from experiments import parameters, video_text

SPECS = video_text.specs("paper")
ROWS = dict(zip(video_text.ROWS, SPECS, strict=False))


def counted(spec: Spec) -> dict[str, int]:
    """`inject`'s count on BART-base with 200 tokens more, features of the spec's width."""
    config = BartConfig(
        vocab_size=50_465, d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        encoder_attention_heads=12, decoder_attention_heads=12, max_position_embeddings=1024,
        feature_size=spec.data.feature_shape[1],
    )  # fmt: skip
    with torch.device("meta"):
        model = VLBart(config)
    return inject(model, spec.method, seed=0)


@pytest.mark.parametrize(
    ("row", "trainable", "total", "percent", "printed"),
    [
        ("LoRA, quoted", 7_607_040, 147_055_104, 5.173, 5.17),
        ("LoRA, matched", 7_607_040, 147_055_104, 5.173, 5.17),
        ("DoRA", 7_634_688, 147_082_752, 5.191, 5.19),
        ("FT", 139_977_216, 139_977_216, 100.0, 100),
    ],
)
def test_parameters_are_those_that_table_3_prints(
    row: str, trainable: int, total: int, percent: float, printed: float
) -> None:
    assert counted(ROWS[row]) == {"trainable": trainable, "total": total}
    assert round(100 * trainable / total, 3) == percent
    assert table.comparison(trainable, total, printed) == "equal"
    claims = paper.claims("video_text")
    method = row.partition(",")[0]
    assert {*claims[claims["method"] == method]["trainable_percent"]} == {printed}
    if method != "FT":
        assert parameters.of_vl_bart("Table 3", method) == {"trainable": trainable, "total": total}


def test_layer_norms_would_not_print_table_3s_percentage() -> None:
    spec = derive(ROWS["DoRA"], {"method.also_train": ",".join((*ROWS["DoRA"].method.also_train, "layer_?norm"))})
    found = counted(spec)
    assert round(100 * found["trainable"] / found["total"], 2) == 5.21


def test_rows_are_as_quoted_matched_and_printed() -> None:
    settings = {
        row: (spec.method.alpha, spec.method.dropout, spec.optim.batch_size, spec.optim.learning_rate)
        for row, spec in ROWS.items()
        if spec.optim is not None
    }
    assert settings == {
        "FT": (None, 0.0, 50, 3e-5),
        "LoRA, quoted": (32.0, 0.1, 50, 3e-4),
        "LoRA, matched": (128.0, 0.0, 40, 3e-4),
        "DoRA": (128.0, 0.0, 40, 3e-4),
    }
    assert Counter(spec.seed for spec in SPECS) == {0: 4, 1: 4, 2: 4}
    for spec in SPECS:
        assert spec.optim is not None
        assert {*spec.optim.task_batch_sizes} == {f"{task}={spec.optim.batch_size}" for task in video_text.TASKS}
        assert (spec.optim.epochs, spec.optim.warmup_fraction, spec.data.feature_shape) == (7, 0.1, (64, 512))
    matched, dora = ROWS["LoRA, matched"], ROWS["DoRA"]
    assert derive(matched, {"method.name": "dora"}) == dora  # nothing else is between them


@pytest.mark.parametrize("row", ROWS)
def test_what_all_rows_share_is_as_released(row: str) -> None:
    """By sight of the scripts' settings and of bart-base's own, which search the labels."""
    data, evaluation, optim = ROWS[row].data, ROWS[row].evaluation, ROWS[row].optim
    assert optim is not None and ROWS[row].probe is not None
    asked = (*video_text.TASKS, "tvqa_val", "how2qa_val", "tvc_val", "yc2c_val")
    assert data.tasks == asked and data.cutoffs == tuple(f"{task}=600/20" for task in asked)
    assert (data.name, data.template, data.cutoff, data.loss) == ("value", "published", 1024, "item_mean")
    assert (data.padding, data.validation_items, data.visual_tokens) == ("read", 0, None)
    assert (evaluation.num_beams, evaluation.task_beams) == (4, ("tvc_val=5", "yc2c_val=5"))
    assert (evaluation.no_repeat_ngram_size, evaluation.early_stopping) == (3, True)
    assert (evaluation.max_new_tokens, evaluation.split) == (19, "test")  # with the decoder's first token 20
    assert (optim.schedule, optim.warmup_steps, optim.max_grad_norm) == ("linear", 0, 5.0)
    assert (optim.optimizer, optim.adam_eps, optim.weight_decay) == ("adamw", 1e-6, 0.01)
    assert optim.micro_batch_size == optim.batch_size and optim.keep == "last"
    names = ("a.weight", "a.layer_norm.weight", "a.bias", "a.m")
    assert [bool(re.search(optim.groups[0].partition("=")[0], name)) for name in names] == [True, True, False, True]


def corrected() -> list[str]:
    """What the docstring's table gives as --with."""
    text = (video_text.__doc__ or "").partition("corrected (--with)")[2].partition("\n\nNot a field")[0]
    return [word for line in text.splitlines() for word in line.split() if "=" in word and not word.endswith("),")]


@pytest.mark.parametrize("change", corrected())
def test_every_corrected_form_is_one_change_away(change: str) -> None:
    field, _, value = change.partition("=")
    assert derive(ROWS["DoRA"], {field: value}) != ROWS["DoRA"]


def test_there_are_eight_of_them() -> None:
    assert len(corrected()) == 8
