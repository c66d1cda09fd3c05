"""Tiny random bases for the matrix: families of transformers, and odd layers; each with a batch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from test_layout import BART, GPT, GQA, IMAGE, MODELS, TEXT
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

IDS = {"input_ids": torch.arange(3, 15).view(2, 6)}
BOTH = IDS | {"decoder_input_ids": torch.arange(3, 11).view(2, 4)}
SEEN = {"pixel_values": torch.linspace(-1, 1, 384, dtype=torch.float64).view(2, 3, 8, 8)}
HEARD = {"input_features": torch.linspace(-1, 1, 640, dtype=torch.float64).view(2, 16, 20)}
STATES = {
    "states": torch.linspace(-1, 1, 30, dtype=torch.float64).view(2, 3, 5),
    "actions": torch.linspace(-1, 1, 18, dtype=torch.float64).view(2, 3, 3),
    "rewards": torch.zeros(2, 3, 1, dtype=torch.float64), "returns_to_go": torch.ones(2, 3, 1, dtype=torch.float64),
    "timesteps": torch.arange(3).repeat(2, 1), "attention_mask": torch.ones(2, 3, dtype=torch.float64),
}  # fmt: skip
CAUSAL = "ForCausalLM"
EAGER = {"experts_implementation": "eager"}  # the fused product of experts takes no float64
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def of(name: str, kind: str, **sizes: Any) -> Callable[[], Any]:
    """A model by the name of its family and the end of its class."""
    return lambda: getattr(T, name + kind)._from_config(getattr(T, f"{name}Config")(**sizes), **EAGER)


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    **{name: (MODELS[name], IDS) for name in ("gpt2", "openai-gpt", "imagegpt", "bloom", "falcon", "gpt-neox", "opt",
                                             "albert", "electra", "mamba", "phi3")},
    **{name: (MODELS[name], BOTH) for name in ("bert and gpt2", "t5", "bart")},
    "decision transformer": (MODELS["decision transformer"], STATES),
    "whisper": (MODELS["whisper"], HEARD | {"decoder_input_ids": BOTH["decoder_input_ids"]}),
    "clip's eye": (MODELS["clip's eye"], SEEN),
    **{name.lower(): (of(name, CAUSAL, **GQA, pad_token_id=0), IDS) for name in (
        "Llama", "Mistral", "Qwen2", "StableLm", "Olmo", "Olmo2", "Cohere", "Starcoder2", "Granite", "SmolLM3")},
    **{name.lower(): (of(name, CAUSAL, **GQA, head_dim=4, pad_token_id=0), IDS) for name in (
        "Qwen3", "Gemma", "Gemma2", "Glm")},
    "mixtral": (of("Mixtral", CAUSAL, **GQA, **EXPERTS), IDS),
    "granitemoe": (of("GraniteMoe", CAUSAL, **GQA, **EXPERTS), IDS),
    "gpt-j": (of("GPTJ", CAUSAL, **GPT, rotary_dim=4), IDS),
    "codegen": (of("CodeGen", CAUSAL, **GPT, rotary_dim=4), IDS),
    "gpt-bigcode": (of("GPTBigCode", CAUSAL, **GPT), IDS),
    "mpt": (of("Mpt", CAUSAL, vocab_size=40, d_model=16, n_layers=1, n_heads=4), IDS),
    "phi": (of("Phi", CAUSAL, **GQA), IDS),
    "mbart": (of("MBart", "ForConditionalGeneration", **BART), BOTH),
    "pegasus": (of("Pegasus", "ForConditionalGeneration", **BART), BOTH),
    "m2m100": (of("M2M100", "ForConditionalGeneration", **BART), BOTH),
    "bert": (of("Bert", "ForMaskedLM", **TEXT), IDS),
    "roberta": (of("Roberta", "ForMaskedLM", **TEXT), IDS),
    "deberta-v2": (of("DebertaV2", "ForMaskedLM", **TEXT, relative_attention=True, position_buckets=4), IDS),
    "distilbert": (of("DistilBert", "ForMaskedLM", vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=4), IDS),
    "mpnet": (of("MPNet", "ForMaskedLM", **TEXT), IDS),
    "vit": (of("ViT", "ForImageClassification", **IMAGE), SEEN),
    "siglip's eye": (of("SiglipVision", "Model", **IMAGE), SEEN),
    "dinov2": (of("Dinov2", "Model", **IMAGE), SEEN),
}  # fmt: skip


class Net(nn.Module):
    """The odd layer, called `fc`, and what follows it."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.fc, self.before = layer, before

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.before(x)))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Child(nn.Linear):
    """A Linear under another name."""


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Attends(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x, x, x)[0]


def zero_row() -> nn.Linear:
    layer = nn.Linear(8, 6)
    nn.init.zeros_(layer.weight[1:2])
    return layer


def line(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


WORDS, ROW, WAVE, PICTURE = torch.tensor([[0, 1, 7], [1, 3, 3]]), line(4, 5, 8), line(2, 4, 9), line(2, 4, 6, 7)
ODD: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a plain Linear": (lambda: Net(nn.Linear(8, 6)), ROW),
    "without a bias": (lambda: Net(nn.Linear(8, 6, bias=False)), ROW),
    "square": (lambda: Net(nn.Linear(8, 8)), ROW),
    "called twice": (lambda: Twice(nn.Linear(8, 8)), ROW),
    "two rows, fewer than the rank": (lambda: Net(nn.Linear(8, 2)), ROW),
    "a row of zeros": (lambda: Net(zero_row()), ROW),
    "a subclass": (lambda: Net(Child(8, 6)), ROW),
    "a forward of its own": (lambda: Net(Doubled(8, 6)), ROW),
    "Conv1D of GPT-2": (lambda: Net(Conv1D(6, 8)), ROW),
    "Embedding": (lambda: Net(nn.Embedding(8, 6)), WORDS),
    "Embedding with padding": (lambda: Net(nn.Embedding(8, 6, padding_idx=1)), WORDS),
    "EmbeddingBag": (lambda: Net(nn.EmbeddingBag(8, 6)), WORDS),
    "Conv1d, stride and padding": (lambda: Net(nn.Conv1d(4, 6, 3, stride=2, padding=1)), WAVE),
    "Conv1d, circular": (lambda: Net(nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")), WAVE),
    "Conv2d, dilation": (lambda: Net(nn.Conv2d(4, 6, 2, bias=False, dilation=2)), PICTURE),
    "Conv2d in groups": (lambda: Net(nn.Conv2d(4, 6, 3, groups=2)), PICTURE),
    "ConvTranspose1d": (lambda: Net(nn.ConvTranspose1d(4, 6, 3)), WAVE),
    "MultiheadAttention": (lambda: Attends(nn.MultiheadAttention(8, 2, batch_first=True)), ROW),
    "weight norm": (lambda: Net(parametrizations.weight_norm(nn.Linear(8, 6))), ROW),
    "spectral norm": (lambda: Net(nn.utils.spectral_norm(nn.Linear(8, 6))), ROW),
}  # fmt: skip
ALL = (*FAMILIES, *ODD)


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    """(base, batch) of that name; the base is in float64 and evaluation, no bias of it is zero."""
    torch.manual_seed(0)
    make, given = FAMILIES[name] if name in FAMILIES else ODD[name]
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, given if name in FAMILIES else {"x": given}
