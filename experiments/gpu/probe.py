"""ΔM and ΔD of saved and of live models against the copy ceiling; merged models against their base."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.gpu import lab
from experiments.gpu.models import SEVEN, kept_llama, llama, llama_config, put_on, stir
from experiments.gpu.visit import Visit

LAYERS = 8  # of 32: what can be written and read in the time


def run(visit: Visit) -> None:
    """Saved models on the processor, from files in the page cache; live ones on the device."""
    visit.free(base=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        visit.cell("probe", "files", 20, lambda: _files(visit, folder))
        if (folder / "dora").exists():
            for tuned in ("full", "lora", "dora"):
                visit.cell("probe", f"saved: {tuned}", 14, lambda tuned=tuned: _saved(visit, folder, tuned))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for name in ("ours/lora", "ours/dora"):
        visit.cell("probe", f"live: {name}", 8, lambda name=name: _live(visit, name))


def run_merge(visit: Visit) -> None:
    """What inference costs adapted and merged, and how far the merged model's logits are off."""
    visit.cell("merge", "latency", 25, lambda: _latency(visit))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        visit.cell("merge", f"logits: {str(dtype)[6:]}", 4, lambda dtype=dtype: _logits(visit, dtype))


def _names(visit: Visit) -> dict[str, tuple[int, int]]:
    rooms = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")
    layers = min(LAYERS, visit.size.layers)
    return {
        f"model.layers.{layer}.{rooms.get(kind, 'mlp')}.{kind}": shape
        for layer in range(layers)
        for kind, shape in visit.size.shapes().items()
    }


def _files(visit: Visit, folder: Path) -> dict[str, Any]:
    """A base, a whole model tuned from it and two adapters, in bfloat16 as such files are."""
    start, names, rank = time.monotonic(), _names(visit), visit.size.rank
    size = 2 * sum(out * width for out, width in names.values())
    if shutil.disk_usage(folder).free < 3 * size:
        return {"skipped": f"the disk has no room for 2 x {size / 1e9:.1f} GB"}
    base: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {"lora": {}, "dora": {}}
    for name, (out, width) in names.items():
        W = torch.randn(out, width, device=visit.device) * 0.02
        base[f"{name}.weight"] = W.bfloat16().cpu()
        full[f"{name}.weight"] = (W * (1 + 0.02 * torch.randn_like(W))).bfloat16().cpu()
        low = {
            f"base_model.model.{name}.lora_A.weight": (torch.randn(rank, width) / width**0.5),
            f"base_model.model.{name}.lora_B.weight": 2e-3 * torch.randn(out, rank),
        }
        norm = base[f"{name}.weight"].float().norm(dim=1) * (1 + 0.01 * torch.randn(out))
        factors["lora"] |= low
        factors["dora"] |= low | {f"base_model.model.{name}.lora_magnitude_vector": norm}
    for kind, tensors in (("base", base), ("full", full)):
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
        llama_config(visit, len(names) // 7).save_pretrained(folder / kind)  # what says which axis is which
    for kind, tensors in factors.items():
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": kind == "dora"}
        (folder / kind / "adapter_config.json").write_text(json.dumps(config))
    return {"seconds": time.monotonic() - start, "bytes": 2 * size, "layers": len(names) // 7}


def _saved(visit: Visit, folder: Path, tuned: str) -> dict[str, Any]:
    """It reads block after block: whether more threads than one pay for blocks as small as a core's cache is told."""
    threads, rows = torch.get_num_threads(), []
    best: dict[str, float] = {}
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            taken = []
            for _ in range(2):  # the first may wait for the disk
                start = time.perf_counter()
                rows = list(lab.probe_saved(folder / "base", [folder / tuned]))
                taken.append(time.perf_counter() - start)
            best[str(count)] = min(taken)
    finally:
        torch.set_num_threads(threads)
    there = [folder / "base", folder / tuned]
    read = sum(file.stat().st_size for path in there for file in path.glob("*.safetensors"))
    finite = all(row["delta_m"] > 0 and row["delta_d"] > 0 for row in rows)
    seconds = min(best.values())
    return _rate(visit, read, seconds) | {"by_threads": best, "rows": len(rows), "ok": finite, "on": "cpu"}


def _live(visit: Visit, name: str) -> dict[str, Any]:
    model = llama(visit, torch.bfloat16, layers=LAYERS)
    callback = lab.DecompositionCallback(lambda row: None)
    with put_on(model, name, SEVEN, visit.size.rank, 2.0 * visit.size.rank):
        callback.begin(model)
        rows: list[dict[str, Any]] = []
        taken = visit.timed(lambda: rows.extend(callback.measure(model)), warm=1, rounds=2)
        read = sum(layer.weight.nbytes for _, layer in lab.adapted(model))
    finite = all(row["delta_d"] > 0 for row in rows)
    return _rate(visit, read, min(taken)) | {"taken": taken, "rows": len(rows), "ok": finite, "on": visit.device}


def _rate(visit: Visit, read: int, seconds: float) -> dict[str, Any]:
    about = {"seconds": seconds, "bytes": read, "gbps": read / seconds / 1e9, "layers": min(LAYERS, visit.size.layers)}
    return about | {"share": visit.share("copy", read, seconds)}


def _latency(visit: Visit) -> dict[str, Any]:
    """Adapted and merged against the base beside them, in turns: prompts, and the token after a prompt."""
    base = kept_llama(visit, torch.bfloat16)
    base.gradient_checkpointing_disable()
    base.eval()
    other, rank, prompt = copy.deepcopy(base), visit.size.rank, 16 if visit.cpu else 512
    found: dict[str, Any] = {"prompt": prompt, "layers": visit.size.layers}
    lab.inject(other, lab.Method(name="dora", rank=rank, alpha=2.0 * rank, target_modules=SEVEN), seed=0)
    stir(other)
    for whose in ("adapted", "merged"):
        if whose == "merged":
            start = time.perf_counter()
            lab.merge(other, keep=False)
            if not visit.cpu:
                torch.cuda.synchronize()
            found["merge_s"] = time.perf_counter() - start
        other.eval()
        steps = [_inference(visit, model, prompt) for model in (base, other)]
        for what in ("prefill", "decode"):
            pair = [step[what] for step in steps]
            rounds = [visit.timed_once(pair) for _ in range(2 if visit.cpu else 18)][0 if visit.cpu else 3 :]
            found[f"{what}_base_s"], found[f"{what}_{whose}_s"] = (
                statistics.median(taken) for taken in zip(*rounds, strict=True)
            )
            found[f"{what}_{whose}_over_base"] = statistics.median(after / before for before, after in rounds)
    read = 2 * sum(p.numel() for p in base.parameters())  # a token needs every weight once
    share = visit.share("copy", read, found["decode_merged_s"])
    return found | {"seconds": found["decode_merged_s"], "share": share}


def _inference(visit: Visit, model: Any, prompt: int) -> dict[str, Callable[[], Any]]:
    """The forward of a prompt; that of one token with a prompt in the cache, which is as long again after it."""
    ids = torch.randint(0, visit.size.vocabulary, (1, prompt), device=visit.device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def prefill() -> None:
        model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return {"prefill": prefill, "decode": decode}


@torch.no_grad()
def _logits(visit: Visit, dtype: torch.dtype) -> dict[str, Any]:
    """Adapted against merged on a few layers of the model's shape; differences in units of the logits' deviation."""
    model = llama(visit, dtype, layers=4).eval()
    ids = torch.randint(0, visit.size.vocabulary, (2, 16 if visit.cpu else 256), device=visit.device)
    rank = visit.size.rank
    lab.inject(model, lab.Method(name="dora", rank=rank, alpha=2.0 * rank, target_modules=SEVEN), seed=0)
    stir(model)
    model.eval()
    before = model(input_ids=ids, use_cache=False).logits.float()
    lab.merge(model, keep=False)
    after = model(input_ids=ids, use_cache=False).logits.float()
    spread = before.std().item()
    largest = (after - before).abs().max().item()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}[dtype]
    return {
        "largest": largest, "spread": spread, "largest_share": largest / spread, "tolerance": tolerance,
        "ok": largest <= tolerance * spread, "layers": model.config.num_hidden_layers,
    }  # fmt: skip
