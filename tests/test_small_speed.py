"""The bench of tier small: its contenders make the same update, and its table counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from analysis.tables import small_speed as table
from experiments import small_speed

TINY = {
    "hidden_size": 96, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": 60, "tie_word_embeddings": True,
}  # fmt: skip


def test_all_contenders_have_the_gradient_of_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what AdamW is given. PEFT draws another A: of its update the magnitudes' gradient is compared."""
    monkeypatch.setitem(small_speed.SHAPE, "vocab_size", 60)
    found: dict[str, list[torch.Tensor]] = {}
    step = torch.optim.AdamW.step

    def seen(optimizer: torch.optim.AdamW, *arguments: object) -> object:
        given = [w.grad.double() for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        found[who] = given
        return step(optimizer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    for who in ("lab-4", "lab-16", "plain", "trainer"):
        small_speed.contender(f"{who}/dora", TINY)(small_speed.items(1))
    magnitudes = {name: [g for g in given if g.ndim == 1] for name, given in found.items()}
    assert len(found["lab-4"]) == len(found["trainer"]) == 30 and len(magnitudes["trainer"]) == 10
    for name, other in (("lab-16", found), ("plain", found), ("trainer", magnitudes)):
        for mine, theirs in zip(other["lab-4"], other[name], strict=True):
            assert (mine - theirs).norm() < 1e-4 * mine.norm() + 1e-9, name


def test_the_table_counts_tokens_products_and_ratios(tmp_path: Path) -> None:
    common = {"tokens": [100, 200], "shape": TINY, "threads": 1, "product_flops": 1e6, "bytes": 2_000_000_000,
              "code": {"commit": "c", "diff": None}}  # fmt: skip
    taken = {"lab-4/lora": [1.0, 2.0], "lab-16/lora": [1.4, 2.8], "trainer/lora": [1.2, 2.4]}
    file = tmp_path / "bench" / "small_speed.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(common | {"contender": n, "seconds": s}) + "\n" for n, s in taken.items()))
    text = table.build(tmp_path)[0].read_text()
    weights = 2 * (96 * 96 * 2 + 96 * 32 * 2 + 3 * 96 * 40)  # q, o, k, v, and three of the MLP
    assert table.linear_weights(TINY) == weights
    assert table.measured(common | {"contender": "", "seconds": [1.0, 2.0]})["share"] == 4 * weights * 100 / 1e6
    assert "1.40 [1.40, 1.40]" in text and "| ≥ 1.35 | yes" in text and "1.20 [1.20, 1.20]" in text
    assert "| ≥ 1.3 | no" in text


def test_both_ways_to_score_options_have_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small_speed.SHAPE, "vocab_size", 60)
    some = small_speed.items(1)
    ours, theirs = (small_speed.contender(f"{who}/options", TINY)(some) for who in ("shared", "lm-eval"))
    assert len(ours) == 64 and len({round(nats, 3) for nats, _ in ours}) > 50
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], rel=1e-4)
