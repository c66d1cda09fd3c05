"""No inference overhead (section 1): merged adapters of `commonsense` against the base and against themselves unmerged.

    make reproduce-commonsense && python -m experiments.merge --results results/local

Trains nothing, so it has no specs. It takes the adapters of seed 0 of LoRA and DoRA at rank 8 (a run's `adapter/` stays
where it was made) and writes results/bench/merge.jsonl: what a forward takes beside the base's, in turns; and by type
of the weights the largest difference of a logit from float64, and the items answered otherwise. Merging adds in float32
and rounds once; int8 is torch's dynamic quantisation of the merged linears, the tied head apart.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_lab.evaluation.evaluate import Part, answers, prepare
from dora_lab.formats.live import load_adapter
from dora_lab.io.atomic import write_text
from dora_lab.io.errors import LoadError
from dora_lab.methods.inject import merge
from dora_lab.models.base import model_and_tokenizer
from dora_lab.runs import provenance
from dora_lab.runs.record import spec_of
from dora_lab.runs.survey import survey, verified
from dora_lab.spec import Spec
from dora_lab.tasks import sources

CELLS = (("lora", 8), ("dora", 8))
TYPES = ("float32", "bfloat16", "float16", "int8")
SHAPES = ((1, 64), (32, 64))  # prompts, tokens
ROUNDS = 200
ITEMS = 50  # of each task


def main(argv: list[str] | None = None) -> None:
    """Measure both adapters and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/local"), help="folder with the runs")
    parser.add_argument("--out", type=Path, default=None, help="file of the rows (default: bench/merge.jsonl of that)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = {"torch": torch.__version__, "code": provenance.code()}
    try:
        rows = [row | about for row in measured(options.results)]
    except LoadError as error:
        parser.error(str(error))
    file = options.out or options.results / "bench" / "merge.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    print(file)


def measured(results: Path, rounds: int = ROUNDS, items: int = ITEMS) -> Iterator[dict[str, Any]]:
    """The rows of both adapters. Raises LoadError where a run, or its adapter, is not there."""
    runs = {
        (spec.method.name, spec.method.rank): (path, spec)
        for path, record in survey(results, "commonsense").runs
        for spec in [spec_of(record)]
        if record["status"] == "complete" and spec.seed == 0 and spec.evaluation.split == "test"
        if (path / "adapter").is_dir() and spec.data.name == "mini2"
    }
    if missing := [f"{method} rank {rank}" for method, rank in CELLS if (method, rank) not in runs]:
        raise LoadError(
            f"{results} has no run with its adapter of {', '.join(missing)}, seed 0, on mini2; "
            "`dora-lab reproduce commonsense` makes them"
        )
    for cell in CELLS:
        path, spec = runs[cell]
        verified(path, "adapter")
        about = {"method": cell[0], "rank": cell[1], "run": path.name}
        yield from (row | about for row in (*latencies(spec, path, rounds), *differences(spec, path, items)))


def latencies(spec: Spec, path: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of a forward over the base's, adapted and merged: one ratio a round, in mixed order."""
    base, adapted, merged = (model_and_tokenizer(spec)[0].eval() for _ in range(3))
    for model in (adapted, merged):
        load_adapter(model, path / "adapter")
    merge(merged, keep=False)
    models = {"base": base, "adapted": adapted.eval(), "merged": merged.eval()}
    mixed = random.Random(0)
    for prompts, tokens in SHAPES:
        ids = torch.randint(3, 200, (prompts, tokens), generator=torch.Generator().manual_seed(0))
        taken: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 5):  # the first ones allocate
            for name in mixed.sample(list(models), len(models)):
                seconds = _seconds(models[name], ids)
                if turn >= 5:
                    taken[name].append(seconds)
        for form in ("adapted", "merged"):
            ratios = [after / before for after, before in zip(taken[form], taken["base"], strict=True)]
            yield {"what": "latency", "form": form, "prompts": prompts, "tokens": tokens, "ratios": ratios}


@torch.no_grad()
def _seconds(model: nn.Module, ids: torch.Tensor) -> float:
    start = time.process_time()  # of the processor: what else runs on the machine counts less
    model(input_ids=ids, use_cache=False)
    return time.process_time() - start


def differences(spec: Spec, path: Path, items: int) -> Iterator[dict[str, Any]]:
    """By type: largest logit difference from the float64 model with its adapter beside it, and labels that flip."""
    exact, tokenizer = model_and_tokenizer(spec)
    load_adapter(exact, path / "adapter")
    exact = exact.double().eval()
    found = sources.items(spec).test
    parts = prepare(spec, exact, tokenizer, {task: pool[:items] for task, pool in found.items()})
    truth, gold = _logits(exact, tokenizer, parts), _answers(spec, exact, tokenizer, parts)
    for dtype in TYPES:
        for form in ("adapted", "merged"):
            if (model := _model(spec, path, dtype, form)) is None:
                continue
            logits, said = _logits(model, tokenizer, parts), _answers(spec, model, tokenizer, parts)
            yield {
                "what": "answers", "type": dtype, "form": form, "items": len(gold), "spread": float(truth.std()),
                "largest": float((logits - truth).abs().max()),
                "flips": sum(one != other for one, other in zip(said, gold, strict=True)),
            }  # fmt: skip


def _model(spec: Spec, path: Path, dtype: str, form: str) -> Any:
    """The adapted model in a type, None where there is no such form: int8 linears are opaque to an adapter."""
    if dtype == "int8":
        if form == "adapted":
            return None
        merged = _model(spec, path, "float32", "merged")
        linears = {name for name, module in merged.named_modules() if isinstance(module, nn.Linear)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # moves to torchao, a package of its own
            return torch.ao.quantization.quantize_dynamic(merged, linears - {"lm_head"}, dtype=torch.qint8)  # tied
    model = model_and_tokenizer(spec)[0]
    load_adapter(model, path / "adapter")
    return (merge(model, keep=False) if form == "merged" else model).to(getattr(torch, dtype)).eval()


@torch.no_grad()
def _logits(model: Any, tokenizer: Any, parts: list[Part]) -> torch.Tensor:
    """float64 logits (P, V) after the first prompt of each task."""
    prompts = [tokenizer(part.questions[0]["prompt"], return_tensors="pt")["input_ids"] for part in parts]
    return torch.cat([model(input_ids=ids, use_cache=False).logits[:, -1].double() for ids in prompts])


def _answers(spec: Spec, model: Any, tokenizer: Any, parts: list[Part]) -> list[str]:
    said = [answers(spec, model, tokenizer, part, lambda: None) for part in parts]
    return [sample["parsed"] for samples in said for sample in samples]


if __name__ == "__main__":
    main()
