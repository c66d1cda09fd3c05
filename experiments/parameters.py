"""How many parameters every method of tables 1-3, 5-7, 12 and 15 trains on the paper's models, beside what it prints.

It trains nothing and loads no weights, so it has no specs: `make parameters`, or

    python -m experiments.parameters [--results DIR]

writes results/bench/parameters.jsonl in about half a minute. LoRA and DoRA are counted on real modules: `inject` on a
model that `transformers` builds from its configuration on the meta device, where a tensor has a shape and no memory.
What this lab has no adapter for is counted from the shapes of the layers, with the sizes that reproduce the printed
percentages (Hu et al. 2023 for Prefix, Series and Parallel; table 11 for VeRA and DVoRA). A percentage is of base and
adapter together.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dora_lab import paper
from dora_lab.io.atomic import write_text
from dora_lab.methods.inject import inject
from dora_lab.models.shapes import PAPER, Shape
from dora_lab.runs import provenance
from dora_lab.spec import Method
from experiments import visual_instruction
from experiments.image_text import adapter

FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BARE = ("o_proj", "gate_proj", "up_proj", "down_proj")  # of table 6: their magnitude alone is trained
BOTTLENECK = 256  # width of Series (on down_proj) and Parallel (on up_proj and down_proj) adapters
PREFIX = {"LLaMA-7B": 30, "LLaMA-13B": 10}  # virtual tokens
FEATURES = {"Table 2": 2048, "Table 3": 512}  # numbers of a region (CLIP RN101) and of a frame (CLIP ViT)
# of the released scripts the one for DoRA on images alone trains layer norms; the percentages prove it
NORMS = {
    (source, method): (source, method) == ("Table 2", "DoRA") for source in FEATURES for method in ("LoRA", "DoRA")
}
MODULES, ARITHMETIC = "inject, meta device", "layer shapes"


def method_of(source: str, name: str, setting: str, rank: float) -> Method | None:
    """The method of a printed row as this lab would run it; None for one that it has no adapter for."""
    name = name.removesuffix("†").lower()
    if name not in ("lora", "dora"):
        return None
    bare = setting == "m: QKVOGUD, V: QKV"
    return Method(
        name=name,
        rank=int(rank),
        alpha=2.0 * rank,
        target_modules=SEVEN if source == "Table 5" else FIVE[:3] if bare else FIVE,
        magnitude_modules=BARE if bare else (),
        detach_norm=setting != "norm in graph",
    )


def of_shapes(model: str, name: str, rank: float) -> int:
    """Parameters of a method that this lab has no adapter for."""
    shape = PAPER[model][0]
    linear = shape.matrices()
    if name == "Prefix":  # a key and a value for each virtual token and layer
        return PREFIX[model] * 2 * shape.layers * shape.hidden
    if name == "Series":
        return shape.layers * 2 * BOTTLENECK * linear["down_proj"][0]
    if name == "Parallel":
        return shape.layers * BOTTLENECK * (sum(linear["up_proj"]) + sum(linear["down_proj"]))
    outputs = shape.layers * sum(out for out, _ in linear.values())
    vera = shape.layers * len(SEVEN) * int(rank) + outputs  # the vectors d (rank) and b (out) of every layer
    if name not in ("VeRA", "DVoRA"):
        raise ValueError(f"method '{name}': no rule to count its parameters by; add one to experiments/parameters.py")
    return vera + (outputs if name == "DVoRA" else 0)


@cache
def counted(shape: Shape, method: Method) -> dict[str, int]:
    """`inject`'s own count, trainable and total, on a model without memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return inject(model, method, seed=0)


def vl_bart_method(name: str, *, norms: bool, rank: int = 128) -> Method:
    """LoRA or DoRA on every q_proj and v_proj of VL-BART, as the released scripts have it.

    Beside it the visual embedding and all biases train, and with `norms` the layer norms; DoRA's norm is in the graph.
    """
    graph = {"detach_norm": False} if name == "dora" else {}
    return adapter(name, norms=norms, rank=rank, **graph)


@cache
def of_vl_bart(source: str, name: str, norms: bool | None = None) -> dict[str, int]:
    """`inject`'s count on VL-BART, BART-base with 200 tokens more; norms: of its layer norms, None: as released."""
    from transformers import BartConfig

    from dora_lab.models.vl_bart import VLBart

    config = BartConfig(
        vocab_size=50_465, d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        encoder_attention_heads=12, decoder_attention_heads=12, max_position_embeddings=1024,
        feature_size=FEATURES[source],
    )  # fmt: skip
    with torch.device("meta"):
        model = VLBart(config)
    norms = NORMS[source, name] if norms is None else norms
    return inject(model, vl_bart_method(name.lower(), norms=norms), seed=0)


def count_vl_bart() -> list[dict[str, Any]]:
    """A row for every percentage that the paper prints for an adapter of VL-BART."""
    printed = paper.claims()
    printed = printed[(printed["kind"] == "number") & (printed["model"] == "VL-BART")]
    printed = printed[printed["source"].isin(list(FEATURES)) & printed["method"].isin(["LoRA", "DoRA"])]
    keys = ["source", "method", "rank", "trainable_percent"]
    return [
        {"source": source, "model": "VL-BART", "method": name, "setting": None, "rank": int(rank)}
        | of_vl_bart(source, name)
        | {"printed_percent": percent, "counted_by": MODULES}
        for source, name, rank, percent in printed[keys].drop_duplicates().itertuples(index=False)
    ]


@cache
def of_llava(name: str, vocabulary: int = 32_000) -> dict[str, int]:
    """`inject`'s count on LLaVA-1.5-7B; vocabulary: vicuna's own, without the <image> of a model that runs."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    words = LlamaConfig(vocab_size=vocabulary)  # all else as LLaMA-7B, its defaults
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=words))
    return inject(model, visual_instruction.adapter(name.lower()), seed=0)


def count_llava() -> list[dict[str, Any]]:
    """A row for every percentage that the paper prints for an adapter of LLaVA."""
    printed = paper.claims()
    printed = printed[(printed["source"] == "Table 12") & printed["method"].isin(["LoRA", "DoRA"])]
    keys = ["source", "model", "method", "rank", "trainable_percent"]
    return [
        {"source": source, "model": model, "method": name, "setting": None, "rank": int(rank)}
        | of_llava(name)
        | {"printed_percent": percent, "counted_by": MODULES}
        for source, model, name, rank, percent in printed[keys].drop_duplicates().itertuples(index=False)
    ]


def count() -> list[dict[str, Any]]:
    """A row for every line of the paper's tables that prints a percentage for one of its language models."""
    printed = paper.claims()
    printed = printed[(printed["kind"] == "number") & printed["model"].isin(list(PAPER))]
    printed = printed[printed["trainable_percent"].notna()]
    keys = ["source", "model", "method", "setting", "rank", "trainable_percent"]
    rows = []
    for source, model, name, setting, rank, percent in printed[keys].drop_duplicates().itertuples(index=False):
        method = method_of(source, name, setting, rank)
        if method is None:
            trainable = of_shapes(model, name, rank)
            numbers = {"trainable": trainable, "total": PAPER[model][0].parameters() + trainable}
        else:
            numbers = counted(PAPER[model][0], method)
        rows.append(
            {"source": source, "model": model, "method": name, "setting": setting or None}
            | {"rank": None if rank != rank else int(rank), **numbers}
            | {"printed_percent": percent, "counted_by": ARITHMETIC if method is None else MODULES}
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Count everything anew and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/local"), help="folder that gets bench/")
    file = parser.parse_args(argv).results / "bench" / "parameters.jsonl"
    about = {"code": provenance.code(), "packages": provenance.packages()}
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [*count(), *count_vl_bart(), *count_llava()]
    write_text(file, "".join(json.dumps(row | about, ensure_ascii=False) + "\n" for row in rows))
    print(file)


if __name__ == "__main__":
    main()
