"""The base of visual_instruction's mini tier: its recipe, and what it can do where it is shipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from dora_lab.forms.llava import Llava
from dora_lab.mini import llava
from dora_lab.mini.llava import corpus, families, pretrain, pretrain_chat, pretrain_vision, talk
from dora_lab.mini.llava.draw import Fault
from dora_lab.mini.llava.views import WORDS, Sign
from dora_lab.mini.vl.scenes import COLOURS, SHAPES, Thing
from dora_lab.models.llava import open_llava

pytestmark = pytest.mark.usefixtures("one_thread")
made = pytest.mark.skipif(
    not (llava.folder() / "config.json").is_file(), reason="the base is not made yet: make mini-llava-base"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return pretrain_chat.make_tokenizer()


def test_every_word_of_the_world_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len({*pretrain_chat.telling(tokenizer).tolist()}) == len(pretrain_chat.telling(tokenizer))
    assert 0 not in pretrain_chat.telling(tokenizer)
    for word in (*COLOURS, *SHAPES, *WORDS, *talk.LETTERS, "Yes", "No", "Unanswerable", "0", "4"):
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    for item in (*families.vqa("test")[::40], *families.sqa("test")[::40], *families.pope("test")[::40]):
        ids = tokenizer(item.turn.text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == item.turn.text and len(ids) <= len(item.turn.text.split()) + 20


def test_marks_of_a_conversation_are_those_of_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for number in (1, 2, 30_000, 30_003):
        turns = corpus.document(number, picking=False)
        batch = pretrain_chat.encode(tokenizer, [turns])
        learnt = tokenizer.decode(batch.ids_BT[0][batch.labels_BT[0].ne(-100)])
        assert learnt == "".join(f" {turn.answer}</s>" for turn in turns)
        told = [piece for piece in turns[0].said if piece.part == "told"]
        assert tokenizer.decode(batch.ids_BT[0][batch.part_BT[0] == 1]).split() == "".join(p.text for p in told).split()
        ends = pretrain_chat.ends(batch)[0]
        assert int((ends & batch.part_BT[0].eq(1)).sum()) == len(told)
        first = batch.ids_BT[0, 1 + batch.labels_BT[0, 1:].ne(-100).nonzero()[0]]
        assert tokenizer.decode(first).strip() == turns[0].answer.split()[0]


def test_guidance_is_nothing_just_where_heads_look_at_what_is_wanted(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = pretrain_chat.encode(tokenizer, [corpus.exam("letter", "colour", number) for number in range(3)])
    B, T = batch.ids_BT.shape
    ends = pretrain_chat.ends(batch)
    own_BTT = (batch.piece_BT[:, :, None].eq(batch.piece_BT[:, None]) & batch.telling_BT[:, None]).float()
    named_BTT = (ends & batch.part_BT.eq(2))[:, None].expand(B, T, T).float()
    told_BTT = (batch.things_BT[:, :, None] | batch.due_BT[:, :, None]).bitwise_and(batch.things_BT[:, None]).ne(0)
    told_BTT = (told_BTT & (ends & batch.part_BT.eq(1))[:, None]).float()
    right_BTT = (ends & batch.part_BT.eq(4))[:, None].expand(B, T, T).float()

    def loss(own: torch.Tensor, named: torch.Tensor, told: torch.Tensor, right: torch.Tensor) -> float:
        rows = [[own, own, own, own], [own, named, own, own], [told, named, own, own], [told, own, right, own]]
        normal = [[head / head.sum(2, keepdim=True).clamp_min(1) for head in row] for row in rows]
        return pretrain_chat.guidance(tuple(torch.stack(row, 1) for row in normal), batch).item()

    named_all = (batch.part_BT.eq(2) & batch.piece_BT.ne(0))[:, None].expand(B, T, T).float()
    assert loss(own_BTT, named_all, told_BTT, right_BTT) == pytest.approx(0, abs=1e-4)
    assert loss(own_BTT, named_BTT.roll(1, 2), told_BTT, right_BTT) > 1
    assert loss(own_BTT, named_all, told_BTT.roll(-1, 2), right_BTT) > 1
    assert loss(own_BTT.roll(1, 2), named_all, told_BTT, right_BTT) > 1
    assert loss(own_BTT, named_all, told_BTT, right_BTT.roll(1, 2)) > 1


def test_a_patch_is_labelled_by_what_covers_it_and_can_be_seen() -> None:
    seen = [Thing("red", "ring", "big", 0, 0, 3), Thing("blue", "star", "small", 1, 2, 2), Sign("zoo", 2, 1)]
    labels = {name: grid.reshape(7, 7) for name, grid in pretrain_vision.shown(seen, Fault()).items()}
    assert (labels["shape"][:2, :2] == SHAPES.index("ring") + 1).all()
    assert labels["shape"][3, 4] == SHAPES.index("star") + 1
    assert (labels["word"][4:6, 2:4] == WORDS.index("zoo") + 1).all()
    assert {name: int((grid > 0).sum()) for name, grid in labels.items()} == {
        "colour": 5, "shape": 5, "size": 5, "word": 4,
    }  # fmt: skip
    assert not any(grid.any() for grid in pretrain_vision.shown(seen, Fault(dark=True)).values())
    assert not pretrain_vision.shown(seen[2:], Fault(thumb=(2, 1)))["word"].any()


def test_what_the_encoder_learns_from_is_what_clips_processor_gives(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """And an untrained base of its sizes opens as a LLaVA, whose form reads the world's items."""
    torch.manual_seed(0)
    words = pretrain_chat.make_model(len(tokenizer))
    encoder = CLIPVisionModel(CLIPVisionConfig(**pretrain_vision.CONFIG))
    pretrain.save(pretrain.join(encoder, words, tokenizer), tokenizer, tmp_path, {})
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3_000_000
    model, processor = open_llava(tmp_path)
    form = Llava(processor)
    item = families.vqa("test")[0]
    picture = llava.pixels(item.seen.pieces, str(item.key))
    file = tmp_path / "picture.jpg"
    file.write_bytes(b"P6 56 56 255\n" + picture.tobytes())
    question = {"text": f"<image>\n{item.turn.text}", "image": file, "where": "test"}
    batch = form.collate([form.question(question)])
    assert torch.equal(batch["pixel_values"], pretrain_vision.as_input([picture]))
    held: Any = model.model
    seen = held.get_image_features(pixel_values=batch["pixel_values"])
    seen = seen if torch.is_tensor(seen) else getattr(seen, "pooler_output", seen)
    read = pretrain_vision.features(held.vision_tower, batch["pixel_values"])
    wanted = held.multi_modal_projector(read)
    assert torch.allclose(seen[0], wanted[0], atol=1e-5)
    shown = pretrain.shown(tokenizer, [0])
    assert form.tokens == pretrain.TOKENS == int((shown["input_ids"] == held.config.image_token_id).sum())
    asked = tokenizer.decode(shown["input_ids"][0][shown["labels"][0] == -100])
    assert asked == tokenizer.decode(
        form.question(question | {"text": f"<image>\n{talk.DESCRIBE}"}).ids  # the same prompt as the template's
    )


def test_a_recipe_is_repeated_to_the_byte_and_says_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(pretrain_chat, "make_tokenizer", lambda: tokenizer)
    for name in ("one", "other"):
        pretrain.pretrain(tmp_path / name, 2, 2, 2, questions=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]
    told = json.loads((tmp_path / "one" / "record.json").read_text())
    assert told["sha256"] == hashlib.sha256(weights[0]).hexdigest()
    assert {*told["vision"]["gate"]} == {*pretrain_vision.FIELDS}
    forms = {f"{form} {kind}" for form, kinds in corpus.KINDS.items() for kind in kinds}
    assert {*told["chat"]["gate"]} == forms and not (tmp_path / "one" / "chat.pt").exists()


def record() -> dict[str, Any]:
    return json.loads((llava.folder() / "record.json").read_text())


@made
def test_it_is_small_and_what_its_record_says() -> None:
    assert sum(file.stat().st_size for file in llava.folder().iterdir()) <= 3_000_000
    assert hashlib.sha256((llava.folder() / "model.safetensors").read_bytes()).hexdigest() == record()["sha256"]
    assert min(record()["vision"]["gate"].values()) > 0.9
    told = record()["chat"]["gate"]
    for form, kinds in corpus.KINDS.items():
        held = [told[f"{form} {kind}"] for kind in dict.fromkeys(kinds)]
        assert sum(held) / len(held) > 0.8, form


@made
@pytest.mark.parametrize(("form", "kind"), [("letter", "colour"), ("insufficient", "where"), ("short", "read")])
def test_from_prose_it_answers_what_it_never_read(form: str, kind: str) -> None:
    """A sample of the gate, asked of the shipped language model."""
    model, processor = open_llava(llava.folder())
    words = pretrain_chat.make_model(cast_words(processor))
    held: Any = model.model
    words.model.load_state_dict(held.language_model.state_dict())
    words.tie_weights()
    hits = pretrain_chat.answers(words.eval(), processor.tokenizer, form, kind, 60)  # type: ignore[attr-defined]
    assert abs(sum(hits) / 60 - record()["chat"]["gate"][f"{form} {kind}"]) < 0.15


def cast_words(processor: Any) -> int:
    return len(processor.tokenizer)
