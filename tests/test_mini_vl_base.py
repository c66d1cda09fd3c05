"""The text base of the world of pictures: its recipe, its size, bytes and what it can tell."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BartForConditionalGeneration, PreTrainedTokenizerFast

from dora_lab.mini import vl
from dora_lab.mini.vl import align, corpus, families, merged, pretrain
from dora_lab.models.vl_bart import open_vl_bart

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pretrain.make_tokenizer()


@pytest.fixture(scope="module")
def model() -> BartForConditionalGeneration:
    return BartForConditionalGeneration.from_pretrained(vl.folder(), dtype=torch.float32).eval()


def test_every_word_of_the_world_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.convert_tokens_to_ids(word) for word in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [
        *range(5)
    ]
    texts = [asked.text for split in families.SPLITS for _, asked in (*families.vqa(split), *families.gqa(split))]
    texts += [asked.text for *_, asked in families.nlvr2("test")] + [
        c for _, all_ in families.coco("test") for c in all_
    ]
    for text in texts[::7]:
        ids = tokenizer(f"vqa: {text}")["input_ids"]
        assert len(ids) == 2 + 2 + len(text.replace("?", " ?").replace(".", " .").replace(",", " ,").split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"vqa: {text}"
    assert len({tokenizer("true")["input_ids"][1], tokenizer("false")["input_ids"][1]}) == 2


def test_a_token_knows_what_it_is_about(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of each kind: the tokens with a thing's bit are the sentence about it, and of the question its name or place."""
    for kind in ("relation", "same", "pair", "gap"):
        document = corpus.exam(kind, 3)
        batch = pretrain.encode(tokenizer, [document])
        for bit in {bits for _, bits in document.told if bits.bit_count() == 1}:
            for prose in (True, False):
                at = (batch.things_BS[0] & bit).ne(0) & (batch.prose_BS[0] == prose)
                parts = document.told[document.questions :] if prose else document.told[: document.questions]
                wanted = "".join(text for text, bits in parts if bits & bit)
                said = tokenizer.decode(batch.ids_BS[0][at])
                assert said.replace(" ", "") == wanted.replace(" ", "")


def test_guidance_is_nothing_just_where_heads_look_evenly_at_what_is_wanted(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = pretrain.encode(tokenizer, [corpus.exam("relation", number) for number in range(4)])
    B, S, T = *batch.ids_BS.shape, batch.labels_BT.shape[1]
    shared_BSS = (batch.things_BS[:, :, None] & batch.things_BS[:, None]).ne(0) & batch.prose_BS[:, None]
    seen_BSS = shared_BSS.float() / shared_BSS.sum(2, keepdim=True).clamp_min(1)
    looked_B2S = (batch.things_BS[:, None] & batch.evidence_B2[..., None]).ne(0) & batch.prose_BS[:, None]
    cross_BHTS = (looked_B2S / looked_B2S.sum(2, keepdim=True))[:, :, None].expand(B, 2, T, S)

    def loss(own: torch.Tensor, cross: torch.Tensor) -> float:
        output = SimpleNamespace(encoder_attentions=[own[:, None]] * 6, cross_attentions=[cross] * 6)
        return pretrain.guidance(output, batch).item()

    assert loss(seen_BSS, cross_BHTS) == pytest.approx(0, abs=1e-5)
    assert loss(torch.full_like(seen_BSS, 1 / S), cross_BHTS) > 1  # the encoder looks everywhere
    assert loss(seen_BSS, cross_BHTS.flip(1)) > 1  # the two steps the wrong way round
    name_BSS = torch.zeros_like(seen_BSS).scatter(2, shared_BSS.float().argmax(2, keepdim=True), 1.0)
    assert loss(name_BSS, cross_BHTS) > 1  # at one word of a sentence alone


@pytest.mark.parametrize("kind", ["relation", "pair"])
def test_all_words_of_a_sentence_are_read_at_one_place(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Held against the document's own segments; of two pictures each sentence has the words that say which, too."""
    documents = [corpus.exam(kind, number) for number in range(6)]
    batch = pretrain.encode(tokenizer, documents)
    places, read_BNS = merged.merge(batch)
    for row, document in enumerate(documents):
        mark, wanted = "", []
        for text, bits in document.told[document.questions :]:
            mark = mark if bits else text
            wanted.append((bits, mark + text if bits else text))
        at = places.prose_BS[row].nonzero().flatten().tolist()
        said = [(int(places.things_BS[row, n]), tokenizer.decode(batch.ids_BS[row][read_BNS[row, n]])) for n in at]
        assert [(bits, text.replace(" ", "")) for bits, text in said] == [
            (bits, text.replace(" ", "")) for bits, text in wanted
        ]
        alone = read_BNS[row].any(1) & ~places.prose_BS[row]  # words of the question, each at its own place
        words = batch.ids_BS[row][~batch.prose_BS[row] & batch.ids_BS[row].ne(1)]
        assert read_BNS[row][alone].sum(1).eq(1).all()
        assert batch.ids_BS[row][read_BNS[row][alone].int().argmax(1)].tolist() == words.tolist()


def test_a_run_is_repeated_to_the_byte_and_says_what_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("one", "other"):
        tokenizer.save_pretrained(tmp_path / name)
        pretrain.pretrain(2, tmp_path / name, questions=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]
    told = json.loads((tmp_path / "one" / "record.json").read_text())
    assert told["sha256"] == hashlib.sha256(weights[0]).hexdigest()
    assert told["documents"] == 64 and told["gate"].keys() == corpus.SHARES.keys() - {*corpus.OPEN}
    assert sum(file.stat().st_size for file in (tmp_path / "one").iterdir()) <= 4 * 1024**2
    for name in ("one", "other"):
        merged.go_on(2, tmp_path / name, questions=2)
    again = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert again[0] == again[1] != weights[0]
    second = json.loads((tmp_path / "one" / "record.json").read_text())
    assert second["sha256"] == hashlib.sha256(again[0]).hexdigest() and second["merged"]["began_from"] == told["sha256"]
    assert second["merged"]["gate"].keys() == told["gate"].keys() and second["documents"] == 64
    with pytest.raises(SystemExit, match="this base had its second part"):
        merged.go_on(2, tmp_path / "one")
    for name in ("one", "other"):
        align.align(tmp_path / name)
    last = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    third = json.loads((tmp_path / "one" / "record.json").read_text())
    assert last[0] == last[1] != again[0] and third["sha256"] == hashlib.sha256(last[0]).hexdigest()
    assert third["merged"] == second["merged"]


def test_an_untrained_bart_of_its_sizes_opens_as_vl_bart_and_learns_from_features(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    pretrain.make_model(len(tokenizer)).save_pretrained(tmp_path)
    model, words = open_vl_bart(tmp_path, vl.SHAPE[1], seed=0)
    key, asked = families.vqa("train")[0]
    text = words([f"vqa: {asked.text}"], return_tensors="pt")
    labels = words([asked.answer], return_tensors="pt")["input_ids"]
    features = torch.from_numpy(vl.features(vl.shown("COCO", key), key)).float()[None, None]
    mask = torch.cat([text["attention_mask"], torch.ones(1, vl.SHAPE[0], dtype=torch.long)], 1)
    loss = model(input_ids=text["input_ids"], attention_mask=mask, features=features, labels=labels).loss
    loss.backward()
    gradient = model.model.encoder.visual_embedding.feature[0].weight.grad
    assert loss.isfinite() and gradient is not None and gradient.abs().sum() > 0


def record() -> dict[str, Any]:
    return json.loads((vl.folder() / "record.json").read_text())


def test_it_is_small_and_what_its_record_says() -> None:
    assert sum(file.stat().st_size for file in vl.folder().iterdir()) <= 4 * 1024**2
    assert hashlib.sha256((vl.folder() / "model.safetensors").read_bytes()).hexdigest() == record()["sha256"]
    assert min(record()["gate"][kind] for kind in ("where", "what", "relation")) >= 0.9


@pytest.mark.parametrize("kind", ["where", "what", "relation"])
def test_from_prose_it_answers_what_it_never_read(model: BartForConditionalGeneration, kind: str) -> None:
    """A sample of the gate, whose record is of 1,000 questions, each of a scene drawn for it."""
    own = PreTrainedTokenizerFast.from_pretrained(vl.folder())
    hits = pretrain.answers(model, own, kind, 100)
    assert sum(hits) >= 85
    assert abs(sum(hits) / 100 - record()["gate"][kind]) < 0.1


def test_where_pictures_begin_is_the_fit_of_its_own_words(model: BartForConditionalGeneration) -> None:
    """Held against normal equations on a fifth of the pictures, and against what the base's folder holds."""
    words = PreTrainedTokenizerFast.from_pretrained(vl.folder())
    keys = sorted({key for key, _ in families.vqa("train")})
    found, explained = align.fitted(model, words, keys[::5])
    told = Random("align")
    rows_PF, sums_PD = [], []
    for key in keys[::5]:
        things = families.shown("COCO", key)
        grid = vl.features(things, key).astype(np.float64).reshape(6, 6, 64)
        rows_PF += [grid[r : r + 2, c : c + 2].max((0, 1)) for r in (0, 2, 4) for c in (0, 2, 4)]
        for sentences in align.said(things, told):
            ids = [words(text, add_special_tokens=False)["input_ids"] for text in sentences]
            sums_PD.append(np.mean([model.get_input_embeddings().weight[one].sum(0).tolist() for one in ids], axis=0))
    X_PF = np.c_[rows_PF, np.ones(len(rows_PF))]
    middle_D = model.get_encoder().embed_positions.weight[2:40].mean(0).tolist()
    W_FD = np.linalg.solve(X_PF.T @ X_PF, X_PF.T @ (np.array(sums_PD) + middle_D))
    prefix = f"{align.VISUAL}.feature"
    assert found[f"{prefix}.0.weight"].numpy() == pytest.approx(W_FD[:-1].T, abs=1e-5)
    assert found[f"{prefix}.0.bias"].numpy() == pytest.approx(W_FD[-1], abs=1e-5)
    assert 0.8 < explained < 0.95
    shipped = load_file(vl.folder() / "model.safetensors")
    whole, explained = align.fitted(model, words, keys)
    for name, tensor in whole.items():
        assert torch.equal(shipped[name].float(), tensor.to(torch.bfloat16).float()) or torch.allclose(
            shipped[name].float(), tensor.float(), rtol=0.01, atol=1e-3
        )
    assert record()["aligned"] == {"pictures": len(keys), "explained": pytest.approx(explained, abs=1e-3)}


def test_every_row_begins_with_the_bases_own_visual_embedding() -> None:
    held = load_file(vl.folder() / "model.safetensors")
    for seed in (0, 1):
        opened, _ = open_vl_bart(vl.folder(), vl.SHAPE[1], seed)
        own = {name: tensor for name, tensor in opened.state_dict().items() if name.startswith(align.VISUAL)}
        assert own.keys() == {name for name in held if name.startswith(align.VISUAL)} and len(own) == 9
        assert all(torch.equal(tensor, held[name].float()) for name, tensor in own.items())


@pytest.mark.parametrize("kind", ["where", "relation"])
def test_sentences_at_one_place_are_read_as_well(model: BartForConditionalGeneration, kind: str) -> None:
    own = PreTrainedTokenizerFast.from_pretrained(vl.folder())
    hits = pretrain.answers(model, own, kind, 100, merged.at_one_place)
    assert abs(sum(hits) / 100 - record()["merged"]["gate"][kind]) < 0.1 and sum(hits) >= 90


def test_the_tokenizer_has_the_words_that_its_recipe_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    assert PreTrainedTokenizerFast.from_pretrained(vl.folder()).get_vocab() == tokenizer.get_vocab()


def test_two_pictures_are_told_apart_and_one_is_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    """The base, untrained, on "there is a ... in the left image": "true" gets likelier where it is true, once pictures
    are in their order; what items with one picture have begins with nothing."""
    model, _ = open_vl_bart(vl.folder(), 64, 0, "float32")
    weight = model.model.encoder.visual_embedding.picture.weight
    assert not weight[0].any() and weight[1].norm() > 1
    asked = [item for item in families.items("nlvr2", "train") if item[-1].kind == "pair3"][:120]
    likely = []
    for order in (1, -1):
        seen = np.stack([[align.seen(families.shown("nlvr", key), key) for key in item[:2][::order]] for item in asked])
        likely.append(_true(model, tokenizer, [item[-1].text for item in asked], seen))
    true = np.array([item[-1].answer == "true" for item in asked])
    shift = likely[0] - likely[1]
    assert shift[true].mean() > 0.02 > -0.02 > shift[~true].mean()


def _true(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str], seen: np.ndarray) -> np.ndarray:
    """Likelihood of "true" over that of "false", in nats."""
    coded = tokenizer([f"nlvr: {text}" for text in texts], padding=True, return_tensors="pt")
    features = torch.from_numpy(seen).float()
    mask = torch.cat([coded["attention_mask"], torch.ones(len(texts), features.shape[1] * features.shape[2])], 1).long()
    start = torch.tensor([[model.config.decoder_start_token_id, tokenizer.bos_token_id]]).repeat(len(texts), 1)
    with torch.no_grad():
        logits = model(
            input_ids=coded["input_ids"], attention_mask=mask, features=features, decoder_input_ids=start
        ).logits[:, -1]
    yes, no = (tokenizer(word)["input_ids"][1] for word in ("true", "false"))
    return (logits[:, yes] - logits[:, no]).numpy()
