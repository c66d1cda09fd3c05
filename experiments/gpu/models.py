"""The models that are measured and the contenders that are put on them and taken off again.

Contenders, "whose/method-form": ours; PEFT's; "authors", the equations as the authors' code computes them, by autograd.
Shape suffixes: O = out features, I = in features, R = rank, T = tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.gpu import lab
from experiments.gpu.visit import Size, Visit

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DROPOUT = 0.05
# a form: fields of our method, and whether its dropout is on
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "": ({}, False),
    "again": ({}, False),  # the same once more: how far apart two measurements of one thing are
    "dropped": ({}, True),
    "published": ({"dropout_form": "published"}, True),
    "branch": ({"dropout_form": "branch"}, True),
    "graph": ({"detach_norm": False}, False),
    "published-graph": ({"dropout_form": "published", "detach_norm": False}, True),
    "magnitudes": ({"magnitude_modules": ("o_proj",)}, False),
    "compiled": ({}, False),
}
PLAIN = "-eager"  # at a name's end: the same without the kernels


@contextlib.contextmanager
def switched(name: str) -> Iterator[None]:
    """No kernels for a contender that wants none, while its step runs."""
    kept = lab.narrow.FUSED
    lab.narrow.FUSED = kept and not name.endswith(PLAIN)
    try:
        yield
    finally:
        lab.narrow.FUSED = kept


def llama_config(visit: Visit, layers: int | None = None) -> Any:
    """A LLaMA of the visit's size, with so many layers or all."""
    from transformers import LlamaConfig

    size = visit.size
    return LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, vocab_size=size.vocabulary,
        num_hidden_layers=min(layers or size.layers, size.layers), num_attention_heads=size.heads,
        num_key_value_heads=size.heads, max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def llama(visit: Visit, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A Llama of the visit's size with random frozen weights, built where it is used."""
    from transformers import AutoModelForCausalLM

    with torch.device(visit.device):
        model: Any = AutoModelForCausalLM.from_config(llama_config(visit, layers), dtype=dtype)
    model.enable_input_require_grads()  # PEFT asks for it where there is checkpointing: the same for all, then
    return model.requires_grad_(False).train()


def kept_llama(visit: Visit, dtype: torch.dtype) -> Any:
    """The whole model, built once and kept for the cells after this one; its weights are nobody's to change."""
    if visit.base is None or visit.base_of != dtype:
        visit.free(base=True)
        visit.base, visit.base_of = llama(visit, dtype), dtype
    return visit.base.train()  # merging leaves it in evaluation, where nothing is dropped or checkpointed


class Linears(nn.Module):
    """The seven linear layers of one decoder layer and nothing between them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        for name, (out, width) in size.shapes().items():
            self.add_module(name, nn.Linear(width, out, bias=False))

    def forward(self, x: Tensor, wide_x: Tensor) -> list[Tensor]:
        """Outputs for x (T, hidden) and, of down_proj, for (T, intermediate)."""
        return [module(wide_x if name == "down_proj" else x) for name, module in self.named_children()]


class AuthorsDora(nn.Module):
    """y = x W^T + (g - 1) drop(x) W^T + g s B A drop(x) + bias, g from a dense W + s B A, as in the released code."""

    def __init__(self, layer: nn.Linear, rank: int, scaling: float, dropout: float, through_norm: bool) -> None:
        super().__init__()
        self.layer, self.scaling, self.dropout, self.through_norm = layer, scaling, dropout, through_norm
        device = layer.weight.device
        bound = layer.in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, device=device).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.magnitude = nn.Parameter(layer.weight.detach().float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight_OI = self.layer.weight
        V_OI = weight_OI + self.scaling * (self.lora_B @ self.lora_A).to(weight_OI.dtype)
        norm_O = torch.linalg.norm(V_OI, dim=1)
        g_O = self.magnitude / (norm_O if self.through_norm else norm_O.detach())
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling
        y = F.linear(x, weight_OI) + ((g_O - 1) * F.linear(dropped, weight_OI)).to(x.dtype) + (g_O * low).to(x.dtype)
        return y if self.layer.bias is None else y + self.layer.bias


@contextlib.contextmanager
def put_on(
    base: Any, name: str, targets: tuple[str, ...], rank: int, alpha: float, dropout: float = DROPOUT
) -> Iterator[Any]:
    """The base with that contender on it, trained values as if after some steps; taken off at the end."""
    whose, _, method = name.removesuffix(PLAIN).partition("/")
    kind, _, form = method.partition("-")
    fields, drops = FORMS[form]
    p, model = (dropout if drops else 0.0), base

    def off() -> None:
        return None

    if whose == "ours" and kind == "ft":
        lab.inject(base, lab.Method(name="ft"), seed=0)
    elif whose == "ours":
        directed = tuple(target for target in targets if target not in fields.get("magnitude_modules", ()))
        shape: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": p, "target_modules": directed}
        lab.inject(base, lab.Method(name=kind, **shape, **fields), seed=0)

        def off() -> None:
            lab.detach(base)

    elif whose == "peft":
        import peft

        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=p, target_modules=list(targets), use_dora=kind == "dora"
        )  # fmt: skip
        model = peft.get_peft_model(base, config)

        def off() -> None:
            model.unload()
            vars(base).pop("peft_config", None)  # it would be taken for a second adapter

    else:
        off = _authors(base, targets, rank, alpha / rank, dropout, form == "graph")
    stir(model)
    try:  # kernels are not switched here: contenders that take turns are there together, see `switched`
        yield model
    finally:
        off()
        base.requires_grad_(False)
        for parameter in base.parameters():
            parameter.grad = None


def _authors(
    base: nn.Module, targets: tuple[str, ...], rank: int, scaling: float, dropout: float, through_norm: bool
) -> Callable[[], None]:
    found = [(name, module) for name, module in base.named_modules() if name.rpartition(".")[2] in targets]

    def place(name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, module)

    for name, module in found:
        place(name, AuthorsDora(module, rank, scaling, dropout, through_norm))  # type: ignore[arg-type]

    def off() -> None:
        for name, module in found:
            place(name, module)

    return off


@torch.no_grad()
def stir(model: nn.Module, size: float = 1e-3) -> None:
    """Move B and m off their start: zeros are cheaper to multiply, and g = 1 hides errors."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.normal_(std=size)
        elif "magnitude" in name and parameter.requires_grad:
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what is trained, in one kernel where there is a GPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=trained[0].is_cuda or None)


def step_of(model: Any, ids: Tensor, autocast: torch.dtype | None = None) -> Callable[[], None]:
    """A training step of a language model on random tokens: forward, backward, AdamW."""
    optimizer = adamw(model)
    where = ids.device.type

    def step() -> None:
        with torch.autocast(where, autocast) if autocast else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def operations(size: Size, tokens: int, length: int, whole: bool = False) -> float:
    """Of a step, without those of adapters and of checkpointing: forward, gradients of inputs and, if `whole`, weights.

    Attention is counted as causal.
    """
    linear = sum(out * width for out, width in size.shapes().values()) * size.layers + size.hidden * size.vocabulary
    dense, attention = 2.0 * linear * tokens, 2.0 * size.layers * tokens * length * size.hidden
    return dense * (3 if whole else 2) + attention * 3
