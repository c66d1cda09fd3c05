"""The decomposition while training, attached to a real `transformers.Trainer` on a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dora_lab.decompose import delta_d, delta_m
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.inject import inject
from dora_lab.probing.callback import DecompositionCallback, probe_step
from dora_lab.spec import Method

KINDS = ("q_proj", "v_proj", "down_proj")
STEPS = 6


def tiny() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def prepared(name: str) -> LlamaForCausalLM:
    model = tiny()
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "target_modules": KINDS} if name in ("lora", "dora") else {}
    inject(model, Method(name=name, **settings), seed=0)
    return model


def train(model: nn.Module, folder: Path, *callbacks: Any, resume: str | None = None, steps: int = STEPS) -> None:
    rows = torch.randint(3, 40, (24, 12), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True,
        save_strategy="steps", save_steps=3, logging_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    items: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=args, train_dataset=items, callbacks=list(callbacks)).train(resume_from_checkpoint=resume)


def peft_model(dora: bool) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=list(KINDS), use_dora=dora, modules_to_save=["lm_head"]
        )
        return peft.get_peft_model(tiny(), config)


def brute_force(W0: torch.Tensor, W: torch.Tensor) -> dict[str, float]:
    """Equations 3 and 4 from two dense weights, in float64."""
    W0, W = W0.double(), W.double()
    norm0, norm = W0.norm(dim=1), W.norm(dim=1)
    return {
        "delta_m": (norm - norm0).abs().mean().item(),
        "delta_d": (1 - (W0 * W).sum(1) / (norm0 * norm)).mean().item(),
        "relative_change": relative_change(W0, W),
        "delta_m_in": (W.norm(dim=0) - W0.norm(dim=0)).abs().mean().item(),
        "delta_d_in": (1 - torch.cosine_similarity(W0, W, dim=0)).mean().item(),
    }


@pytest.mark.parametrize("name", ["ft", "lora", "dora"])
def test_rows_at_the_fractions_are_what_brute_force_gives(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    model = prepared(name)
    train(model, tmp_path, DecompositionCallback(rows.append, (0.5, 1.0), KINDS))
    assert [(row["fraction"], row["step"]) for row in rows[:: 2 * len(KINDS)]] == [(0.5, 3), (1.0, STEPS)]
    assert len(rows) == 2 * 2 * len(KINDS)
    start: dict[str, Any] = dict(tiny().named_modules())
    for row in rows[2 * len(KINDS) :]:
        assert list(row)[:8] == ["step", "fraction", "module", "layer", "kind", "delta_m", "delta_d", "relative_change"]
        assert {"delta_m", "delta_d", "relative_change", "grown", "magnitude_still"} < set(row)
        assert (row["kind"], row["layer"]) == (row["module"].split(".")[-1], int(row["module"].split(".")[2]))
        module: Any = model.get_submodule(row["module"])
        W = module.effective_weight() if isinstance(module, AdaptedLinear) else module.weight.detach()
        expected = brute_force(start[row["module"]].weight.detach(), W)
        assert all(row[key] == pytest.approx(value, rel=1e-3) for key, value in expected.items())
        assert min(expected.values()) > 1e-4, "training moved nothing"
    assert {(row["layer"], row["kind"]) for row in rows} == {(layer, kind) for layer in (0, 1) for kind in KINDS}


@pytest.mark.parametrize("dora", [False, True])
def test_peft_models_are_understood(dora: bool, tmp_path: Path) -> None:
    """Against PEFT's own merge; what it saves beside the adapter is measured as well."""
    rows: list[dict[str, Any]] = []
    model = peft_model(dora)
    train(model, tmp_path, DecompositionCallback(rows.append, (1.0,), (*KINDS, "lm_head")))
    start: dict[str, Any] = dict(tiny().named_modules())
    merged: dict[str, Any] = dict(model.double().merge_and_unload().named_modules())
    assert len(rows) == 2 * len(KINDS) + 1 and rows[-1]["kind"] == "lm_head"
    for row in rows:
        expected = brute_force(start[row["module"]].weight.detach(), merged[row["module"]].weight.detach())
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-4 if dora else 1e-5), (row["module"], key)
        assert expected["delta_d"] > 1e-4 and row["magnitude_still"] is (
            False if dora and row["layer"] is not None else None
        )


@pytest.mark.parametrize("whose", ["ours", "peft"])
def test_a_magnitude_that_never_moves_is_told(whose: str, tmp_path: Path) -> None:
    model = prepared("dora") if whose == "ours" else peft_model(True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    rows: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match=r"step 6: no magnitude of 'model\.layers\.0\S+' \(6 such layers\) has moved"):
        train(model, tmp_path, DecompositionCallback(rows.append, (1.0,), KINDS))
    assert all(row["magnitude_still"] for row in rows)


def test_several_or_merged_adapters_of_peft_are_refused() -> None:
    model = peft_model(False)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged: True; one, unmerged, is needed"):
        DecompositionCallback(lambda row: None, kinds=KINDS).begin(model)


def relative_change(W0_OI: torch.Tensor, W_OI: torch.Tensor) -> float:
    """Frobenius norm of W - W0 over that of W0: what the column of committed records is."""
    return (torch.linalg.vector_norm(W_OI - W0_OI) / torch.linalg.vector_norm(W0_OI)).item()


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_numbers_are_those_of_the_dense_formulas(name: str, tmp_path: Path) -> None:
    """What committed records were made by: `delta_m`, `delta_d` and `relative_change` of two whole weights."""
    rows: list[dict[str, Any]] = []
    model = prepared(name)
    train(model, tmp_path, DecompositionCallback(rows.append, (1.0,), KINDS))
    for row in rows:
        layer: Any = model.get_submodule(row["module"])
        pair = layer.base_weight().double(), layer.effective_weight().double()
        for key, formula in (("delta_m", delta_m), ("delta_d", delta_d), ("relative_change", relative_change)):
            assert row[key] == pytest.approx(formula(*pair), rel=1e-5), key


class Pair(nn.Module):
    """Two layers, adapted or not, for tests in two processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8)


def shifted(name: str, how: str, world: int = 1) -> list[dict[str, Any]]:
    """Rows after every trained number has been moved by the same rule."""
    model: Any = Pair()
    settings: dict[str, Any] = {"rank": 3, "alpha": 6.0, "target_modules": ("first", "second")} if name != "ft" else {}
    inject(model, Method(name=name, **settings), seed=0)
    inner = model
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    probe = DecompositionCallback(lambda row: None, kinds=("first", "second"))
    probe.begin(inner)
    with torch.no_grad():
        for parameter in (p for p in inner.parameters() if p.requires_grad):
            parameter.mul_(1.02).add_(0.01)
    return probe.measure(inner)


CASES = (("ft", "ddp"), ("ft", "fsdp2"), ("lora", "fsdp2"), ("dora", "fsdp2"))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    Path(f"{folder}/{rank}.json").write_text(json.dumps([shifted(name, how, 2) for name, how in CASES]))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert second == [[]] * len(CASES), "the first process alone has rows"
    for (name, _), rows in zip(CASES, first, strict=True):
        for seen, expected in zip(rows, shifted(name, "alone"), strict=True):
            assert expected["delta_d"] > 1e-6
            for key, value in expected.items():
                assert seen[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", ["base", "ft", "lora", "dora"])
def test_nothing_has_moved_before_training(name: str) -> None:
    model = prepared(name)
    probe = DecompositionCallback(lambda row: None, kinds=KINDS)
    probe.begin(model)
    for row in probe.measure(model):
        # DoRA's magnitudes begin as |W0| rounded to float32
        rounded = 1e-7 if name == "dora" else 0.0
        assert row["delta_d"] == 0.0 and row["delta_m"] <= rounded * 0.1 and row["relative_change"] <= rounded


@pytest.mark.parametrize("name", ["ft", "dora"])
def test_the_probe_changes_nothing(name: str, tmp_path: Path) -> None:
    plain, probed = prepared(name), prepared(name)
    train(plain, tmp_path / "a")
    after_plain = torch.get_rng_state()
    train(probed, tmp_path / "b", DecompositionCallback(lambda row: None, (0.1, 0.2, 1.0), KINDS))
    assert torch.equal(torch.get_rng_state(), after_plain)
    for (key, a), b in zip(plain.state_dict().items(), probed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["ft", "lora", "dora"])
def test_a_resumed_training_measures_from_the_first_start(name: str, tmp_path: Path) -> None:
    whole: list[dict[str, Any]] = []
    resumed: list[dict[str, Any]] = []
    train(prepared(name), tmp_path, DecompositionCallback(whole.append, (0.5, 1.0), KINDS))
    initial = None
    if name == "ft":
        save_file({key: value.contiguous() for key, value in tiny().state_dict().items()}, tmp_path / "start")
        initial = load_file(tmp_path / "start").__getitem__
        with pytest.raises(ValueError, match=r"training resumes at step 3 and .* its initial weight is gone"):
            callback = DecompositionCallback(resumed.append, (0.5, 1.0), KINDS)
            train(prepared(name), tmp_path, callback, resume=str(tmp_path / "checkpoint-3"))
    callback = DecompositionCallback(resumed.append, (0.5, 1.0), KINDS, initial=initial)
    train(prepared(name), tmp_path, callback, resume=str(tmp_path / "checkpoint-3"))
    assert resumed == whole[2 * len(KINDS) :]


@pytest.mark.parametrize(("fraction", "steps", "step"), [(0.25, 100, 25), (1, 7, 7), (0.5, 7, 4), (0.01, 7, 1)])
def test_the_step_of_a_fraction(fraction: float, steps: int, step: int) -> None:
    assert probe_step(fraction, steps) == step


def test_fractions_that_meet_have_a_row_each(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    train(prepared("lora"), tmp_path, DecompositionCallback(rows.append, (0.25, 0.5, 0.75, 1.0), ("q_proj",)), steps=2)
    assert [(row["fraction"], row["step"]) for row in rows if row["layer"] == 0] == [
        (0.25, 1), (0.5, 1), (0.75, 2), (1.0, 2),
    ]  # fmt: skip


def test_what_cannot_be_watched_is_named() -> None:
    with pytest.raises(ValueError, match=r"fractions \[0, 1\.5\] are not in \(0, 1\]"):
        DecompositionCallback(lambda row: None, (0, 0.5, 1.5))
    model = tiny()
    with pytest.raises(ValueError, match="no module is named 'q_prj'; did you mean 'q_proj'"):
        DecompositionCallback(lambda row: None, kinds=("q_prj",)).begin(model)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp' is a LlamaMLP, neither a matrix nor adapted"):
        DecompositionCallback(lambda row: None, kinds=("mlp",)).begin(model)
    with pytest.raises(ValueError, match=r"call begin\(model\) before training"):
        DecompositionCallback(lambda row: None, kinds=KINDS).measure(model)
