"""Adapted layers in their place: hooks, what the modules around read, layers that are more than a product, wrappers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dora_lab import detach, inject, merge, unmerge
from dora_lab.methods.inject import adapted
from dora_lab.spec import Method

NAMES = ("lora", "dora")


def method(name: str, *targets: str) -> Method:
    return Method(name=name, rank=2, alpha=4.0, target_modules=targets)


def stirred(model: Any, name: str, *targets: str) -> Any:
    inject(model, method(name, *targets), seed=0)
    with torch.no_grad():
        for _, layer in adapted(model):
            some: Any = layer
            some.lora_A.normal_(generator=torch.Generator().manual_seed(1))
            some.lora_B.normal_(generator=torch.Generator().manual_seed(2))
    return model


class Net(nn.Module):
    """One layer `fc` of any kind, and what is made of its output."""

    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def net(fc: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(7, 9) if fc is None else fc).double()


X = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [nn.Linear, type("Strange", (nn.Linear,), {})])
def test_hooks_are_called_once_around_whatever_layer_stands_there(name: str, kind: Any) -> None:
    model, seen = net(kind(7, 9)), []
    model.fc.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    model.fc.register_forward_hook(lambda _, args, y: 3 * y)
    handle = model.fc.register_forward_hook(lambda _, args, kwargs, y: seen.append(y), with_kwargs=True)
    base = model(X)
    stirred(model, name, "fc")
    layer: Any = model.fc
    V = layer.effective_weight().double()
    expected = 3 * F.linear(2 * X, V, layer.offset)
    for step in (lambda m: m, merge, unmerge):
        step(model)
        seen.clear()
        torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
        assert len(seen) == 1
    handle.remove()
    merge(model)
    seen.clear()
    assert model(X) is not None and not seen, "a hook that was removed is still called"
    unmerge(model)
    detach(model)
    assert torch.equal(model(X), base) and type(model.fc) is kind


@pytest.mark.parametrize("name", NAMES)
def test_backward_hooks_see_the_gradients_of_the_adapted_layer(name: str) -> None:
    model, seen = net(), []
    model.fc.register_full_backward_hook(lambda _, into, out: seen.append((into[0], out[0])))
    stirred(model, name, "fc")
    x, layer = X.clone().requires_grad_(), model.fc
    model(x).backward(upstream := torch.randn(4, 9, dtype=torch.float64))
    into, out = seen.pop()
    assert torch.equal(out, upstream) and not seen
    torch.testing.assert_close(into, upstream @ layer.effective_weight())  # type: ignore[operator]


COMPUTED = {
    "weight norm": lambda fc: weight_norm(fc),
    "spectral norm": lambda fc: spectral_norm(fc),
    "pruning": lambda fc: prune.random_unstructured(fc, "weight", 0.3),
    "pruned bias": lambda fc: prune.random_unstructured(fc, "bias", 0.3),
    "parametrized weight norm": lambda fc: parametrizations.weight_norm(fc),
    "orthogonal": lambda fc: parametrizations.orthogonal(fc),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", COMPUTED)
def test_a_weight_that_is_computed_at_each_call_is_refused(case: str, name: str) -> None:
    model = net(COMPUTED[case](nn.Linear(7, 9))).eval()
    base, keys = model(X), set(model.state_dict())
    with pytest.raises(ValueError, match=r"fc: the weight of this \w+ is computed anew at each call"):
        inject(model, method(name, "fc"), seed=0)
    assert torch.equal(model(X), base) and set(model.state_dict()) == keys


class Product(nn.Linear):
    """As Falcon's: the product, written out."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Activated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Routed(nn.Linear):
    def forward(self, input: Tensor, expert: int) -> Tensor:  # type: ignore[override]
        return super().forward(input)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_subclass_merges_into_itself_in_the_bases_type(name: str, dtype: torch.dtype) -> None:
    model = stirred(net(Product(7, 9)).to(dtype), name, "fc")
    layer: Any = model.fc
    V = layer.effective_weight()
    torch.testing.assert_close(
        model(X.to(dtype)), F.linear(X.to(dtype), V.to(dtype), layer.offset), rtol=3e-2, atol=0.3
    )
    merge(model)
    assert type(model.fc) is Product and {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.fc.weight, V.to(dtype))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Twice, "Twice is more than the product"), (Activated, "Activated is more"), (Routed, "Routed cannot be tried")],
)
def test_a_forward_that_is_another_function_is_refused_by_name(kind: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inject(net(kind(7, 9)), method("dora", "fc"), seed=0)


def test_a_forward_put_over_a_layer_is_kept() -> None:
    model, calls = net(), []
    plain = model.fc.forward
    model.fc.forward = lambda x: calls.append(1) or plain(x)  # as accelerate does
    stirred(model, "dora", "fc")
    calls.clear()
    layer: Any = model.fc
    torch.testing.assert_close(model(X), F.linear(X, layer.effective_weight().double(), layer.offset))
    assert calls
    model.fc.forward = None
    embedding = nn.Embedding(7, 9)
    embedding.forward = embedding.forward
    with pytest.raises(ValueError, match="Embedding with a forward put over its own cannot be adapted"):
        inject(net(embedding), method("dora", "fc"), seed=0)


# --- what the modules around a layer do with it


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mamba":
        config = transformers.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
        return transformers.MambaForCausalLM(config)
    if kind == "deberta":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
        config = transformers.DebertaV2Config(vocab_size=40, relative_attention=True, position_buckets=4, **sizes)
        return transformers.DebertaV2Model(config)
    if kind == "detr":
        stages = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "out_features": ["stage2"]}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16}
        eye = transformers.ResNetConfig(**stages, layer_type="basic")
        return transformers.DetrModel(transformers.DetrConfig(backbone_config=eye, **layers))
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=40, num_mel_bins=6, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        )
    )  # fmt: skip


READ = [("mamba", "dt_proj"), ("deberta", "rel_embeddings"), ("detr", "query_position_embeddings")]


@pytest.mark.parametrize(("kind", "target"), READ)
def test_a_layer_that_is_read_and_never_called_is_refused(kind: str, target: str) -> None:
    model = tiny(kind)
    with pytest.raises(ValueError, match=f"{target}: is never called: .* reads its weight"):
        inject(model, method("lora", target), seed=0)
    assert not list(adapted(model))


@pytest.mark.parametrize("name", NAMES)
def test_torchs_encoder_calls_what_is_adapted_in_evaluation_too(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2)
    model, x = stirred(copy.deepcopy(plain), name, "linear1", "linear2"), torch.randn(2, 5, 8)
    with torch.no_grad():
        for where, one in adapted(model):  # the oracle: a plain encoder with the weights written in
            plain.get_submodule(where).weight.copy_(one.effective_weight())  # type: ignore[operator]
        expected = plain.train()(x)
        for step in (lambda m: m, merge, unmerge):
            torch.testing.assert_close(step(model).eval()(x), expected, rtol=1e-5, atol=1e-5)
    detach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Fused(Net):
    """Calls its layer or, fused, reads it."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        return self._inner(x) if self.fused else self.fc(x)

    def _inner(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_a_pass_that_reads_a_layer_in_place_of_calling_it_is_stopped() -> None:
    torch.manual_seed(0)
    model = stirred(nn.Sequential(Fused(nn.Linear(7, 9))).double(), "dora", "fc")
    model(X)
    inner: Any = model[0]
    inner.fused = True
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(
            RuntimeError, match=r"'0.fc' is adapted, and Fused computed with its weight without calling"
        ):
            one(X)
    expected = F.linear(X, inner.fc.effective_weight(), inner.fc.bias)
    torch.testing.assert_close(merge(model)(X), expected)


def test_what_others_read_of_a_layer_is_still_there() -> None:
    """Whisper asks its convolutions for their stride (under PEFT that fails); the oracle has the weights written in."""
    plain = tiny("whisper").double().eval()
    ours = stirred(copy.deepcopy(plain), "dora", "conv1", "conv2")
    given = {"input_features": torch.randn(1, 6, 20).double(), "decoder_input_ids": torch.tensor([[3, 4, 5]])}
    with torch.no_grad():
        for name, layer in adapted(ours):
            weight = plain.get_submodule(name).weight
            weight.copy_(layer.effective_weight().view(weight.shape))  # type: ignore[operator]
        torch.testing.assert_close(ours(**given).logits, plain(**given).logits, rtol=1e-10, atol=1e-10)


class Named(nn.Linear):
    """Calls a number of its own as the adapted layer calls its bias."""

    def __init__(self) -> None:
        super().__init__(7, 9)
        self.offset = 2


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_with_a_name_of_ours_is_adapted_or_refused_by_name(name: str) -> None:
    """OPT's learned positions have an `offset`, too."""
    torch.manual_seed(0)
    plain = Named().double()
    model = stirred(nn.Sequential(copy.deepcopy(plain)), name, "0")
    (layer,) = (one for _, one in adapted(model))
    torch.testing.assert_close(model(X), F.linear(X, layer.effective_weight(), plain.bias))
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=40, word_embed_proj_dim=16, **sizes))
    with pytest.raises(ValueError, match="embed_positions: a OPTLearnedPositionalEmbedding cannot be adapted"):
        inject(opt, method(name, "embed_positions"), seed=0)


def test_a_layer_that_stands_in_two_places_is_adapted_in_both() -> None:
    shared = nn.Linear(7, 7)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    inject(model, method("dora", "0"), seed=0)
    assert model["a"][0] is model["b"][0] and len(list(adapted(model))) == 1  # type: ignore[index]
    detach(model)
    assert model["a"][0] is model["b"][0] is shared  # type: ignore[index]
