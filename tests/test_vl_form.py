"""VL-BART's form: answers drawn by their scores, texts cut, the loss by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pictured import save_bart

from dora_lab.forms.form import IGNORED
from dora_lab.forms.vl_bart import VLBartForm
from dora_lab.models.vl_bart import open_vl_bart
from dora_lab.spec import Data
from dora_lab.tasks import ItemError
from dora_lab.tasks.limits import NO_LIMITS
from dora_lab.tasks.pictures import Pictures

KEYS = (("COCO", "a"), ("COCO", "b"))
PICTURES = Pictures(np.arange(24, dtype=np.float16).reshape(2, 4, 3), {key: n for n, key in enumerate(KEYS)}, "")
DATA = Data(name="vl_adapter", tasks=("vqa",), template="published", feature_shape=(4, 3), cutoffs=("vqa=6/4",))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_vl_bart(save_bart(tmp_path_factory.mktemp("bart"), ("red", "dark red", "vqa: what")), 3, 0)


def form(tokenizer: Any, loss: str = "scored") -> VLBartForm:
    return VLBartForm(PICTURES, loss, 0, tokenizer.pad_token_id, tokenizer.eos_token_id, 2)


def item(number: int, targets: dict[str, float], text: str = "what") -> dict[str, Any]:
    return {"id": str(number), "pictures": KEYS[:1], "text": text, "targets": targets, "best": [*targets][:1]}


def test_answers_are_drawn_by_score_from_seed_pass_and_item(opened: Any) -> None:
    _, tokenizer = opened
    ours = form(tokenizer)
    pool = [item(n, {"red": 1.0, "dark red": 0.25}) for n in range(400)]
    examples = ours.encode({"vqa": pool}, replace(DATA, cutoffs=()), tokenizer, NO_LIMITS).examples

    def drawn(seeded: VLBartForm, epoch: int) -> list[float]:
        return seeded.collate(examples, [epoch] * len(examples))["scores"].tolist()

    first = drawn(ours, 0)
    assert Counter(first)[1.0] == pytest.approx(320, abs=32) and set(first) == {1.0, 0.25}
    assert drawn(ours, 0) == first != drawn(ours, 1)
    assert drawn(replace(ours, seed=1), 0) != first
    assert ours.collate(examples[5:6], [0])["scores"].tolist() == first[5:6]  # whoever stands beside it


def test_texts_and_answers_are_cut_and_counted(opened: Any) -> None:
    _, tokenizer = opened
    pool = [item(0, {"red": 1.0}), item(1, {"red red red red": 1.0}, "what what what what what"), item(2, {})]
    encoded = form(tokenizer).encode({"vqa": pool}, DATA, tokenizer, NO_LIMITS)
    whole = form(tokenizer).encode({"vqa": pool}, replace(DATA, cutoffs=()), tokenizer, NO_LIMITS)
    assert (encoded.answers_cut, encoded.unanswered, whole.shortened, whole.answers_cut) == (1, 1, 0, 0)
    long, uncut = encoded.examples[1], whole.examples[1]
    assert long.ids == (*uncut.ids[:5], tokenizer.eos_token_id) and len(uncut.ids) > 6
    assert long.targets[0][0] == (*uncut.targets[0][0][:3], tokenizer.eos_token_id)
    assert form(tokenizer).learnt(encoded) is encoded
    assert form(tokenizer, "item_mean").learnt(encoded).examples == encoded.examples[:2]
    with pytest.raises(ItemError, match="no training item has an answer with a score"):
        form(tokenizer).learnt(replace(encoded, examples=encoded.examples[2:]))


@pytest.mark.parametrize("template", ["published", "bare", "clean"])
def test_questions_that_a_cutoff_takes_are_counted(template: Any, opened: Any) -> None:
    """The limit moves token by token: the word that says the task goes first, then the choices, then the question."""
    _, tokenizer = opened
    data = replace(DATA, tasks=("tvqa",), template=template, cutoffs=())
    question, behind = "[Subs] red what [Q] dark red", " [TS] (1-2) [Choices] a0: red. a1: what."
    pool = [item(0, {"a0": 1.0}, question + behind) | {"question": question}]

    def encoded(limit: int) -> Any:
        return form(tokenizer).encode(
            {"tvqa": pool}, replace(data, cutoffs=(f"tvqa={limit}/20",)), tokenizer, NO_LIMITS
        )

    whole = form(tokenizer).encode({"tvqa": pool}, data, tokenizer, NO_LIMITS).examples[0].ids
    head = [*tokenizer(("tvqa: " if template == "clean" else "") + question)["input_ids"][:-1]]
    assert [*whole[: len(head)]] == head
    said = tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    word = {"published": f"{question}{behind} tvqa: ", "bare": f"{question}{behind} "}
    assert said == word.get(template, f"tvqa: {question}{behind}")
    assert (encoded(len(whole)).shortened, encoded(len(whole)).questions_cut) == (0, 0)
    assert (encoded(len(whole) - 1).shortened, encoded(len(whole) - 1).questions_cut) == (1, 0)
    kept = encoded(len(head) + 1)  # and the end
    assert kept.questions_cut == 0 and [*kept.examples[0].ids] == [*head, tokenizer.eos_token_id]
    assert encoded(len(head)).questions_cut == 1
    pool[0].pop("question")
    assert encoded(len(head) + 1).questions_cut == 1  # where nothing else is said, all of the text is asked


def test_the_loss_by_hand(opened: Any) -> None:
    model, tokenizer = opened
    model.eval()
    pool = [item(0, {"red": 0.5}), item(1, {"dark red": 1.0}, "what what"), item(2, {})]
    encoded = form(tokenizer).encode({"vqa": pool}, replace(DATA, cutoffs=()), tokenizer, NO_LIMITS)
    batch = form(tokenizer).collate(encoded.examples, [0, 0, 0])
    means, tokens = [], []
    for example, (ids, _) in zip(
        encoded.examples, [*(e.targets[0] for e in encoded.examples[:2]), ((2,), 0)], strict=True
    ):
        alone = form(tokenizer).inputs([example])
        means.append(model(**alone, labels=torch.tensor([ids])).loss.item())  # transformers' own shift and mean
        tokens.append(len(ids))
    expected = {
        "scored": (0.5 * means[0] + means[1], 3),
        "item_mean": (sum(means), 3),
        "token_mean": (sum(mean * n for mean, n in zip(means, tokens, strict=True)), sum(tokens)),
    }
    for loss, (total, count) in expected.items():
        assert form(tokenizer, loss).loss(model, batch).item() == pytest.approx(total, rel=1e-5)
        assert form(tokenizer, loss).count(batch) == count
    assert batch["labels"][0].ne(IGNORED).sum() == tokens[0]
