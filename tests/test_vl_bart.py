"""VL-BART: parameters as printed, the joint encoder against one written out, answers, tokens, folders, adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pictured import save_bart
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.tables.parameters import comparison
from dora_lab import inject, load_adapter, paper, save_adapter
from dora_lab.io.errors import CheckpointError
from dora_lab.models.vl_bart import TOKENS, VLBart, open_vl_bart
from experiments import parameters

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, REGIONS = 6, 4
SENTENCES = ("what is red", "how many rings are there in this picture", "yes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bart"), SENTENCES)


def opened(folder: Path, seed: int = 0, **how: Any) -> tuple[VLBart, Any]:
    model, tokenizer = open_vl_bart(folder, WIDTH, seed, **how)
    with torch.no_grad():
        for parameter in model.model.encoder.visual_embedding.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-1, 1, len(parameter)))
    return model.eval(), tokenizer


def batch(tokenizer: Any, texts: tuple[str, ...] = SENTENCES, pictures: int = 2) -> dict[str, Tensor]:
    """Texts of different lengths, padded on the right, with features that each are their own."""
    text = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    seen = torch.randn(len(texts), pictures, REGIONS, WIDTH, generator=torch.Generator().manual_seed(3))
    mask = torch.cat([text["attention_mask"], torch.ones(len(texts), pictures * REGIONS, dtype=torch.long)], dim=1)
    return {"input_ids": text["input_ids"], "attention_mask": mask, "features": seen}


# --- what the paper prints


@pytest.mark.parametrize(
    ("source", "method", "trainable", "total", "printed"),
    [
        ("Table 2", "LoRA", 8_786_688, 148_234_752, 5.93),
        ("Table 2", "DoRA", 8_838_912, 148_262_400, 5.96),
        ("Table 3", "LoRA", 7_607_040, 147_055_104, 5.17),
        ("Table 3", "DoRA", 7_634_688, 147_082_752, 5.19),
    ],
)
def test_the_printed_shares_are_reached(source: str, method: str, trainable: int, total: int, printed: float) -> None:
    claims = paper.claims()
    said = claims[(claims["source"] == source) & (claims["method"] == method) & (claims["kind"] == "number")]
    assert set(said["trainable_percent"]) == {printed}
    assert parameters.of_vl_bart(source, method) == {"trainable": trainable, "total": total}
    assert comparison(trainable, total, printed) == "equal"
    other = parameters.of_vl_bart(source, method, norms=not parameters.NORMS[source, method])  # the other reading
    assert comparison(other["trainable"], other["total"], printed).startswith("differs")


# --- the joint encoder, written out


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _attend(state: dict[str, Tensor], name: str, x: Tensor, over: Tensor, causal: bool) -> Tensor:
    q, k, v = (_linear(state, f"{name}.{part}_proj", at) for part, at in (("q", x), ("k", over), ("v", over)))
    size, found = x.shape[-1] // 4, []
    for head in range(4):
        mine = slice(head * size, (head + 1) * size)
        scores = q[:, mine] @ k[:, mine].T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        found.append(scores.softmax(-1) @ v[:, mine])
    return _linear(state, f"{name}.out_proj", torch.cat(found, dim=-1))


def _layers(state: dict[str, Tensor], side: str, x: Tensor, over: Tensor | None = None) -> Tensor:
    for number in range(2):
        at = f"model.{side}.layers.{number}"
        x = _norm(state, f"{at}.self_attn_layer_norm", x + _attend(state, f"{at}.self_attn", x, x, over is not None))
        if over is not None:
            attended = _attend(state, f"{at}.encoder_attn", x, over, False)
            x = _norm(state, f"{at}.encoder_attn_layer_norm", x + attended)
        inner = F.gelu(_linear(state, f"{at}.fc1", x))
        x = _norm(state, f"{at}.final_layer_norm", x + _linear(state, f"{at}.fc2", inner))
    return x


def _written_out(model: VLBart, ids: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Logits (labels, words) of one item without padding, in float64, from the tensors of the model alone."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    words, place = state["model.shared.weight"], "model.encoder.visual_embedding."

    def read(side: str, ids: Tensor) -> Tensor:
        positions = state[f"model.{side}.embed_positions.weight"][2 : 2 + len(ids)]
        return _norm(state, f"model.{side}.layernorm_embedding", words[ids] + positions)

    seen = []
    for picture, regions in enumerate(features.double()):
        for region, feature in enumerate(regions):
            token = _norm(state, f"{place}feature.1", _linear(state, f"{place}feature.0", feature))
            token = token + _norm(state, f"{place}box.1", _linear(state, f"{place}box.0", torch.zeros(5).double()))
            seen.append(token + state[f"{place}picture.weight"][picture] + words[len(words) - 1 - region])
    encoded = _layers(state, "encoder", torch.cat([read("encoder", ids), torch.stack(seen)]))
    given = torch.cat([torch.tensor([model.config.decoder_start_token_id]), labels[:-1]])
    return _layers(state, "decoder", read("decoder", given), encoded) @ words.T


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_loss_is_that_of_the_model_written_out(pictures: int, folder: Path) -> None:
    model, tokenizer = opened(folder, dtype="float64")
    inputs = batch(tokenizer, pictures=pictures)
    inputs["features"] = inputs["features"].double()
    labels = tokenizer(["no", "three rings", "yes"], padding=True, return_tensors="pt")
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    text = inputs["attention_mask"][:, : -pictures * REGIONS].sum(1)
    sums, count = torch.zeros(()).double(), 0
    for ids, length, features, label in zip(inputs["input_ids"], text, inputs["features"], labels, strict=True):
        wanted = label[label != -100]
        sums += F.cross_entropy(_written_out(model, ids[:length], features, wanted), wanted, reduction="sum")
        count += len(wanted)
    torch.testing.assert_close(loss, sums / count, rtol=1e-12, atol=0)
    loss.backward()
    visual = dict(model.model.encoder.visual_embedding.named_parameters())
    still = {name for name, parameter in visual.items() if not parameter.grad.any()}  # type: ignore[union-attr]
    assert still == {"box.0.weight"}  # all boxes are zero
    assert visual["picture.weight"].grad.any(1).tolist() == [True, pictures == 2]  # type: ignore[union-attr]


# --- answers


@pytest.mark.parametrize("beams", [1, 5])
def test_answers_in_a_batch_are_those_alone(beams: int, folder: Path) -> None:
    model, tokenizer = opened(folder, dtype="float64")
    how: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 8, "no_repeat_ngram_size": 0, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_scores": True}

    def answers(inputs: dict[str, Tensor]) -> tuple[list[str], Tensor]:
        """Texts, and the scores (items, words) of their first tokens."""
        encoded = model.get_encoder()(**inputs)
        found: Any = model.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], **how)
        return tokenizer.batch_decode(found.sequences), found.scores[0][::beams]

    whole = batch(tokenizer)
    together, first = answers(whole)
    for number, text in enumerate(SENTENCES):
        alone = batch(tokenizer, (text,)) | {"features": whole["features"][number, None]}
        (answer,), scores = answers(alone)
        assert together[number].replace("<pad>", "") == answer.replace("<pad>", "")
        torch.testing.assert_close(first[number], scores[0], rtol=1e-10, atol=1e-10)
        directly: Any = model.generate(**alone, **how)  # transformers runs the encoder by itself
        assert tokenizer.batch_decode(directly.sequences) == [answer]
    blind = answers(whole | {"features": torch.zeros_like(whole["features"])})[1]
    for other in (first.roll(1, 0), blind):  # it does depend on text and pictures
        assert not bool(torch.isclose(first, other, rtol=1e-3).all(1).any())


# --- folders


def test_tokens_are_those_of_the_release(folder: Path) -> None:
    model, tokenizer = open_vl_bart(folder, WIDTH, seed=0)
    before = load_file(folder / "model.safetensors")["model.shared.weight"]
    rows = model.get_input_embeddings().weight
    assert len(tokenizer) == len(rows) == len(before) + 200 and torch.equal(rows[: len(before)], before)
    added = tokenizer.convert_ids_to_tokens([*range(len(before), len(rows))])
    assert (added[0], added[99], added[100], added[-1]) == (
        "<extra_id_99>", "<extra_id_0>", "<vis_extra_id_99>", "<vis_extra_id_0>",
    )  # fmt: skip
    assert len(TOKENS) == 200 and tokenizer("<vis_extra_id_7>")["input_ids"] == [0, len(rows) - 8, 2]
    new = rows[len(before) :].detach()
    assert new.std().item() == pytest.approx(0.3, rel=0.1)  # N(0, init_std), not near the mean of the old
    assert model.lm_head.weight is rows and model.model.encoder.embed_tokens.weight is rows
    assert model.final_logits_bias.shape == (1, len(rows))


def test_what_is_drawn_comes_from_the_seed_alone(folder: Path) -> None:
    first, _ = open_vl_bart(folder, WIDTH, seed=1)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    again, _ = open_vl_bart(folder, WIDTH, seed=1)
    assert torch.equal(torch.randn(3), expected)
    other, _ = open_vl_bart(folder, WIDTH, seed=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        drawn = name == "model.shared.weight" or ("visual_embedding" in name and parameter.dim() == 2)
        assert torch.equal(parameter, other.get_parameter(name)) != drawn, name


def test_a_saved_one_opens_as_itself(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = open_vl_bart(tmp_path, WIDTH, seed=9)
    assert len(words) == len(tokenizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="takes features of 6 numbers, not 7"):
        open_vl_bart(tmp_path, 7, seed=0)
    tensors = load_file(tmp_path / "model.safetensors")
    for lost in ("model.encoder.visual_embedding.box.0.bias", "model.decoder.layers.0.fc1.bias"):
        save_file({k: t for k, t in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"do not fill the model: .*{lost}"):
            open_vl_bart(tmp_path, WIDTH, seed=0)


def test_a_folder_that_is_no_bart_is_refused(folder: Path, tmp_path: Path) -> None:
    from tiny import save_model

    with pytest.raises(CheckpointError, match=r"give a BART without layer drop \(a llama is in it\)"):
        open_vl_bart(save_model(tmp_path), WIDTH, seed=0)


def test_inputs_that_do_not_fit_are_refused(folder: Path) -> None:
    model, tokenizer = opened(folder)
    inputs = batch(tokenizer)
    for change, words in (
        ({"features": None}, "features are None: expected"),
        ({"features": inputs["features"][..., :5]}, r"\(3, 2, 4, 5\): expected \(items, pictures, regions, 6\)"),
        ({"features": inputs["features"].repeat(1, 2, 1, 1)}, "of 4 pictures an item: 1 or 2"),
        ({"attention_mask": inputs["attention_mask"][:, :-8]}, r"attention_mask is .*: expected \(3, "),
        ({"attention_mask": None}, "attention_mask is None"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**(inputs | change), labels=inputs["input_ids"])


# --- adapters


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_as_released_is_saved_whole(name: str, folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model, tokenizer = open_vl_bart(folder, WIDTH, seed=0)
    inject(model, parameters.vl_bart_method(name, norms=name == "dora", rank=4), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    inputs = batch(tokenizer)
    inputs["labels"] = inputs["input_ids"]
    save_adapter(model.eval(), tmp_path, "peft")
    again = load_adapter(open_vl_bart(folder, WIDTH, seed=0)[0], tmp_path).eval()
    theirs = PeftModel.from_pretrained(open_vl_bart(folder, WIDTH, seed=0)[0], tmp_path).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        torch.testing.assert_close(theirs(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="made for the base"):  # its tokens and visual embedding are part of it
        load_adapter(open_vl_bart(folder, WIDTH, seed=1)[0], tmp_path)
