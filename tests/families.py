"""Random models of a few thousand parameters of the families that people bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import byte_tokenizer

NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = NARROW | {"intermediate_size": 64, "num_key_value_heads": 1}
# by transformers' model type: what its configuration is given beside the vocabulary and the special tokens
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": NARROW | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
    "gpt_neox": NARROW | {"intermediate_size": 64, "max_position_embeddings": 128},
    "qwen2": GATED | {"max_position_embeddings": 128},
    "gemma": GATED | {"head_dim": 16, "max_position_embeddings": 128},
    "phi": NARROW | {"intermediate_size": 64, "max_position_embeddings": 128},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gemma2": GATED | {"head_dim": 16, "sliding_window": 8, "max_position_embeddings": 128},
    "mixtral": GATED | {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """A random model of a family with a byte-level tokenizer, saved as a hub model would be."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        name, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **(FAMILIES[name] | changes)
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
