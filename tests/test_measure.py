"""ΔM and ΔD between saved models, against float64 brute force and against PEFT's own merge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import make_spec
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dora_lab
from dora_lab.decompose import change, delta_d, delta_m, factored_change
from dora_lab.formats.live import save_adapter
from dora_lab.formats.shards import Shards
from dora_lab.io.errors import CheckpointError
from dora_lab.probing import saved_models
from dora_lab.probing.pairs import Matrix, Replaced
from dora_lab.probing.saved_models import changes, probe
from dora_lab.runs.directory import RunDir
from dora_lab.spec import Method

KINDS = ("q_proj", "v_proj", "down_proj")


def truth(W0: Tensor, W: Tensor, axis: str = "out") -> dict[str, float]:
    """The textbook formulas in float64."""
    W0, W = (w.double() if axis == "out" else w.double().t() for w in (W0, W))
    m0, m = W0.norm(dim=1), W.norm(dim=1)
    turned = ((W / m[:, None] - W0 / m0[:, None]).square().sum(1) / 2).nanmean()  # zero rows have no direction
    return {
        "delta_m": (m - m0).abs().mean().item(),
        "delta_d": turned.item(),
        "relative_change": ((W - W0).norm() / W0.norm()).item(),
        "grown": (m > m0).double().mean().item(),
    }


def check(row: dict[str, Any], W0: Tensor, W: Tensor, axis: str = "out", rel: float = 1e-5) -> None:
    for name, value in truth(W0, W, axis).items():
        assert row[name] == pytest.approx(value, rel=rel), (row["module"], name)


def streamed(W0: Tensor, W: Tensor, axis: str, folder: Path) -> dict[str, float]:
    """Through files, in blocks."""
    for name, weight in (("base", W0), ("tuned", W)):
        (folder / name).mkdir(exist_ok=True)
        save_file({"a.weight": weight}, folder / name / "model.safetensors")
    base, after = Shards(folder / "base"), Shards(folder / "tuned")
    rows, width = W0.shape
    seen = changes(base, Matrix("a.weight", (rows, width), False), [Replaced(after, "a.weight")], axis)[0]
    assert not isinstance(seen, CheckpointError)
    return {"delta_m": seen.delta_m.abs().mean().item(), "delta_d": seen.delta_d.nanmean().item()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.floats(1e-4, 1.0), along=st.sampled_from([0.0, 0.9, 1.0]), block=st.integers(1, 40),
    axis=st.sampled_from(["out", "in"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_small_changes_keep_their_digits(
    size: float, along: float, block: int, axis: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to a relative change of 1e-4, across the weight or nearly along it, in float32 (a true ΔD of 5e-9)."""
    monkeypatch.setattr(saved_models, "BLOCK", 200 * block)
    source = torch.Generator().manual_seed(seed)
    W0 = torch.randn(24, 200, generator=source)
    noise = torch.randn(24, 200, generator=source)
    W = W0 + size * (along * W0 + (1 - along if along < 1 else 1e-3) * noise)
    expected, seen = truth(W0, W, axis), streamed(W0, W, axis, tmp_path)
    assert seen["delta_m"] == pytest.approx(expected["delta_m"], rel=1e-5)
    assert seen["delta_d"] == pytest.approx(expected["delta_d"], rel=1e-5, abs=1e-16)
    found = change(W0, W, axis=axis)
    assert seen["delta_m"] == pytest.approx(found.delta_m.abs().mean().item(), rel=1e-5)
    assert seen["delta_d"] == pytest.approx(found.delta_d.mean().item(), rel=1e-5, abs=1e-16)


def test_rows_without_a_direction_and_turned_ones() -> None:
    W0 = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    W = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    seen = change(W0, W)
    assert seen.delta_d[[0, 3]].tolist() == [2.0, 0.0] and seen.delta_d[[1, 2]].isnan().all()
    assert seen.delta_m.tolist() == [0.0, 1.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="axis = 'rows': must be 'out' or 'in'"):
        change(W0, W, axis="rows")


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("scale", [1e-10, 1e-17, 1e-22, 1e-30])
def test_rows_too_small_for_float32_squares_are_no_rows_of_zeros(scale: float, axis: str, tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    W0 = torch.randn(6, 40, generator=source)
    W = W0 + 0.1 * torch.randn(6, 40, generator=source)
    for side in (W0, W):
        (side[:3] if axis == "out" else side[:, :10]).mul_(scale)
    expected, found = truth(W0, W, axis), change(W0, W, axis=axis)
    seen = streamed(W0, W, axis, tmp_path)
    for name in ("delta_m", "delta_d"):
        assert seen[name] == pytest.approx(expected[name], rel=1e-5)
        assert getattr(found, name).abs().mean().item() == pytest.approx(expected[name], rel=1e-5)
    small, (A, B) = W0[:3], (torch.randn(2, 40, generator=source), scale * torch.randn(3, 2, generator=source))
    m = 1.1 * small.double().norm(dim=1)
    V = small.double() + 2 * B.double() @ A.double()
    for magnitude, W64 in ((None, V), (m, m[:, None] * V / V.norm(dim=1, keepdim=True))):
        factored = factored_change(small, A, B, 2.0, magnitude) if axis == "out" else change(small, W64, axis="in")
        expected = truth(small, W64, axis)
        assert factored.delta_d.nanmean().item() == pytest.approx(expected["delta_d"], rel=1e-5)
        assert factored.delta_m.abs().mean().item() == pytest.approx(expected["delta_m"], rel=1e-5)
    if axis == "out":
        assert delta_m(W0[:3], W[:3]) == pytest.approx(truth(W0[:3], W[:3])["delta_m"], rel=1e-5)
        assert delta_d(W0[:3], W[:3]) == pytest.approx(truth(W0[:3], W[:3])["delta_d"], rel=1e-5)


# --- saved models


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2} | more
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.2, **sizes))


def dense(model: Any, folder: Path) -> dict[str, Tensor]:
    """Weights as transformers loads them, in float64."""
    return weights(model.from_pretrained(folder, dtype=torch.float64))


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16))


def moved(model: Any, size: float) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * parameter.abs().mean() * torch.randn_like(parameter))
    return model


def weights(model: Any) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("shard", ["5MB", "8KB"])
def test_two_whole_models(axis: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_models, "BLOCK", 200)  # a few rows at a time
    llama().save_pretrained(tmp_path / "base", max_shard_size=shard)
    moved(llama(), 1e-3).save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    rows = list(probe(tmp_path / "base", [tmp_path / "tuned"], axis=axis))
    before, after = weights(llama()), weights(moved(llama(), 1e-3))
    assert len(rows) == 3 * 7 and {row["kind"] for row in rows} >= set(KINDS)
    for row in rows:
        check(row, before[row["module"]], after[row["module"]], axis)
        assert (row["layer"], row["undirected"], row["axis"]) == (int(row["module"].split(".")[2]), 0, axis)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_against_pefts_merge(make: Any, dora: bool, axis: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(saved_models, "BLOCK", 300)
    targets = list(KINDS) if make is llama else ["c_attn", "c_proj"]
    make().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=targets, use_dora=dora, rank_pattern={targets[0]: 2}, use_rslora=True,
        fan_in_fan_out=make is gpt2,
    )  # fmt: skip
    model = moved(peft.get_peft_model(make(), config), 0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.01) if "magnitude" in name else parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    rows = list(probe(tmp_path / "base", [tmp_path / "tuned"], axis=axis))
    before = weights(make())
    after = weights(model.double().merge_and_unload())
    assert {row["module"] for row in rows} == {name for name in before if name.rpartition(".")[2] in targets}
    for row in rows:
        W0, W = (w[row["module"]] if make is llama else w[row["module"]].t() for w in (before, after))
        check(row, W0, W, axis, rel=1e-4 if dora else 1e-5)  # the merge takes its norms in float32


def test_our_adapters_in_every_format_and_a_trajectory(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    run = tmp_path / "trained"
    for step in (200, 20):
        model = llama()
        dora_lab.inject(model, Method(name="dora", rank=4, alpha=8.0, target_modules=KINDS), seed=0)
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(1e-4 * step * torch.randn_like(parameter))
        save_adapter(model, run / f"checkpoint-{step}")
    save_adapter(model, tmp_path / "authors", format="authors")
    rows = list(probe(tmp_path / "base", [run, tmp_path / "authors"], kinds=("q_proj",)))
    assert [row["step"] for row in rows] == [20, 200, None] * 3, "matrix by matrix"
    rows = rows[0::3] + rows[1::3] + rows[2::3]
    before = weights(llama())
    for mine, theirs in zip(rows[:3], rows[6:], strict=True):
        assert {**mine, "tuned": 0, "step": 0} == {**theirs, "tuned": 0, "step": 0}
        W = model.get_submodule(mine["module"]).effective_weight()
        check(mine, before[mine["module"]], W, rel=1e-3)  # that weight is rounded to float32
    with RunDir.open(tmp_path / "results", make_spec()) as finished:
        shutil.copytree(run / "checkpoint-20", finished.adapter)
        finished.finish("complete")
    again = list(probe(tmp_path / "base", [finished.path], kinds=("q_proj",)))
    for one, other in zip(again, rows[:3], strict=True):  # with others in one product its last digits may differ
        assert one["delta_d"] == pytest.approx(other["delta_d"], rel=1e-7)


def test_dynamics(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model, name = llama(), "model.layers.1.self_attn.q_proj"
    torch.manual_seed(3)
    u, v = (torch.nn.functional.normalize(torch.randn(32), dim=0) for _ in range(2))
    sigma = torch.linalg.svdvals(model.get_submodule(name).weight.detach())[0].item()
    with torch.no_grad():
        model.get_submodule(name).weight.add_(3 * sigma * torch.outer(u, v))  # one large new direction
    model.save_pretrained(tmp_path / "tuned")
    rows = {r["module"]: r for r in probe(tmp_path / "base", [tmp_path / "tuned"], kinds=("q_proj",), dynamics=True)}
    row = rows[name]
    assert row["effective_rank"] == pytest.approx(1, abs=0.01)
    assert row["sigma_1"] == pytest.approx(3, rel=1e-3) and row["sigma_2"] < 1e-5
    assert row["intruders"] >= 1
    still = rows["model.layers.0.self_attn.q_proj"]
    assert (still["effective_rank"], still["intruders"], still["delta_d"], still["delta_m"]) == (0.0, 0, 0.0, 0.0)


def test_what_is_saved_beside_an_adapter_and_a_magnitude_that_never_moved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    model.save_pretrained(tmp_path / "tuned")
    rows = list(probe(tmp_path / "base", [tmp_path / "tuned"]))
    assert [row["kind"] for row in rows] == ["lm_head"] + ["q_proj"] * 3
    assert [row["magnitude_still"] for row in rows] == [None, True, True, True]
    merged = weights(model.merge_and_unload())
    check(rows[0], weights(llama())["lm_head"], merged["lm_head"])


def test_many_in_one_pass_are_what_each_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_models, "BLOCK", 300)
    llama().save_pretrained(tmp_path / "base")
    folders = [tmp_path / name for name in ("full", "dora", "lora", "other")]
    moved(llama(), 1e-3).save_pretrained(folders[0])
    for seed, folder in enumerate(folders[1:]):
        model = llama()
        name = "dora" if folder.name == "dora" else "lora"
        inject = Method(name=name, rank=2 + seed, alpha=8.0, target_modules=KINDS)
        dora_lab.inject(model, inject, seed=seed)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(1.01).add_(0.01)
        save_adapter(model, folder)
    reads: list[str] = []
    fill = Shards.fill
    monkeypatch.setattr(
        Shards, "fill", lambda self, name, start, out: (reads.append(self.folder.name), fill(self, name, start, out))[1]
    )
    for axis in ("out", "in"):
        together = {
            (row["tuned"], row["module"]): row for row in probe(tmp_path / "base", folders, kinds=KINDS, axis=axis)
        }
        if axis == "out":
            assert reads.count("base") == reads.count("full"), "the base is read once for all of them"
        for folder in folders:
            for alone in probe(tmp_path / "base", [folder], kinds=KINDS, axis=axis):
                seen = together[str(folder), alone["module"]]
                for key, value in alone.items():
                    loose = 1e-5 * alone["radial_sd"] if key in ("growth", "radial") else None  # means that cancel
                    near = pytest.approx(value, rel=1e-5, abs=loose) if isinstance(value, float) else value
                    assert seen[key] == near, key
