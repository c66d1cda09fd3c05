"""LLaVA's form: prompts and masks to the letter, the processor of transformers as oracle, images, answers, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer
from tiny_llava import save_image, save_llava, save_mix

from dora_lab.forms.llava import IGNORED, Llava, opened
from dora_lab.io.errors import CheckpointError
from dora_lab.models.llava import open_llava
from dora_lab.spec import Data, SpecError
from dora_lab.tasks import ItemError
from dora_lab.tasks.conversations import read_conversations
from dora_lab.tasks.limits import Limits

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
)
TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llava")
    save_llava(where / "model")
    save_mix(where / "data")
    return where


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any, Llava]:
    model, processor = open_llava(folder / "model")
    return model.eval(), processor, Llava(processor)


def pools(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return read_conversations(folder / "data" / "llava_v1_5_mix665k.json", folder / "data")


def cut_at(tokens: int) -> Data:
    return Data(name="mix", tasks=(), cutoff=tokens, truncation="right")


def texts(form: Llava, example: Any) -> tuple[str, list[str]]:
    """The prompt as the model sees it, an image's tokens as one, and what is learnt of it."""
    learnt, runs = False, []
    for token, label in zip(example.ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            runs = [*runs[:-1], [*runs[-1], token]] if learnt else [*runs, [token]]
        learnt = label != IGNORED
    whole = form.tokenizer.decode(example.ids).replace("<image>" * TOKENS, "<image>")
    return whole, [form.tokenizer.decode(run) for run in runs]


# --- prompts and masks


def test_prompts_and_masks_are_those_of_vicuna(folder: Path, loaded: tuple[Any, Any, Llava]) -> None:
    form, read = loaded[2], pools(folder)
    assert [len(pool) for pool in read.values()] == [8, 4]
    found = form.encode(read, cut_at(2048))
    assert (found.shortened, found.answers_cut) == (0, 0)
    seen, plain = found.examples[0], found.examples[8]
    assert texts(form, seen) == (
        f"<s> {SYSTEM} USER: <image> \nWhat colour is it? ASSISTANT: red</s> USER: Is it red? ASSISTANT: yes</s>",
        ["red</s>", "yes</s>"],
    )
    assert texts(form, plain) == (f"<s> {SYSTEM} USER: Is it red? ASSISTANT: yes</s>", ["yes</s>"])
    assert (seen.task, plain.task, plain.image) == ("image", "text", None)
    # what is learnt begins with the blank before the answer
    first = next(number for number, label in enumerate(seen.labels) if label != IGNORED)
    assert form.tokenizer.convert_ids_to_tokens(seen.ids[first])[0] == "▁"
    assert form.tokenizer.convert_ids_to_tokens(seen.ids[first - 1])[-1] == ":"


def test_it_is_what_the_processor_of_transformers_gives(folder: Path, loaded: tuple[Any, Any, Llava]) -> None:
    _, processor, form = loaded
    items = [item for pool in pools(folder).values() for item in pool]
    for item, example in zip(items, form.encode(pools(folder), cut_at(2048)).examples, strict=True):
        said = [
            {"role": role, "content": text}
            for turn in item["turns"]
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        how = {"images": [opened(item["image"], "")]} if item["image"] else {}
        found = processor.apply_chat_template(
            said, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt",
            processor_kwargs=how,
        )  # fmt: skip
        assert found["input_ids"][0].tolist() == list(example.ids)
        assert found["assistant_masks"][0].tolist() == [int(label != IGNORED) for label in example.labels]
        inputs = form.collate([example])
        assert ("pixel_values" in inputs) == bool(item["image"])
        if item["image"]:
            assert torch.equal(found["pixel_values"], inputs["pixel_values"])


@pytest.mark.parametrize(
    ("marked", "instead"),
    [
        ("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"),  # it would never learn to end
        ("USER: {{ message.content }}", "{% generation %}USER: {{ message.content }}{% endgeneration %}"),
        ("message.content }}{{ eos", "message.content }}{{ eos_token }}{{ eos"),
    ],
)  # fmt: skip
def test_a_mask_that_is_not_the_answers_is_refused(marked: str, instead: str, loaded: tuple[Any, Any, Llava]) -> None:
    other = copy.copy(loaded[1])
    assert marked in other.chat_template
    other.chat_template = other.chat_template.replace(marked, instead)
    with pytest.raises(ItemError, match=r"the tokenizer masks .* of a probe whose answers are"):
        Llava(other)


def test_an_image_mark_that_is_no_token_is_refused(loaded: tuple[Any, Any, Llava]) -> None:
    other = copy.copy(loaded[1])
    other.tokenizer = byte_tokenizer()
    with pytest.raises(ItemError, match="with 0 <image> where an image has 16"):
        Llava(other)


def test_what_is_cut_is_counted_and_never_the_image_or_all_answers(
    folder: Path, loaded: tuple[Any, Any, Llava]
) -> None:
    form, read = loaded[2], pools(folder)
    (whole,) = form.encode({"image": read["image"][:1]}, cut_at(2048)).examples
    cut = form.encode({"image": read["image"][:1]}, cut_at(len(whole.ids) - 1))
    assert (cut.shortened, cut.answers_cut) == (1, 1) and cut.examples[0].ids == whole.ids[:-1]
    first = next(number for number, label in enumerate(whole.labels) if label != IGNORED)
    with pytest.raises(ItemError, match=r"mix665k\.json, item 0: no token of an answer is among its first"):
        form.encode({"image": read["image"][:1]}, cut_at(first))
    item = {**read["image"][0], "turns": [("Is it?", "red"), ("<image>\nWhat?", "red")]}
    with pytest.raises(ItemError, match=r"item 0: 3 <image> tokens within .*, its image has 16"):
        start = form.encode({"image": [item]}, cut_at(2048)).examples[0].ids.index(form.image_id)
        form.encode({"image": [item]}, cut_at(start + 3))
    with pytest.raises(ItemError, match="item 0: 50 tokens exceed the model's 49 positions; lower data"):
        form.encode({"image": [item]}, cut_at(50), None, Limits(49, 999))
    with pytest.raises(SpecError, match="cut on the right, as released"):
        form.encode({"image": [item]}, Data(name="mix", tasks=()))


# --- images


def test_an_image_is_padded_to_a_square_with_the_mean_colour(folder: Path, loaded: tuple[Any, Any, Llava]) -> None:
    form = loaded[2]
    file = save_image(folder / "tall.png", "red", (28, 56))
    (example,) = form.encode({"image": [item_of(file)]}, cut_at(2048)).examples
    pixels = form.collate([example])["pixel_values"][0]
    mean, sd = torch.tensor(form.images.image_mean)[:, None], torch.tensor(form.images.image_std)[:, None]
    edge = pixels[:, :, 0] * sd + mean  # a quarter of the width on each side
    wanted = torch.tensor([int(255 * number) / 255 for number in form.images.image_mean])[:, None]
    torch.testing.assert_close(edge, wanted.expand_as(edge), rtol=0, atol=1e-5)
    middle = (pixels[:, :, 14] * sd + mean) * 255
    torch.testing.assert_close(middle[:, 0], torch.tensor([250.0, 10.0, 10.0]), rtol=0, atol=1.0)


def item_of(file: Path, question: str = "What colour is it?") -> dict[str, Any]:
    return {"image": file, "turns": [(f"<image>\n{question}", "red")], "where": "here"}


def test_an_image_that_does_not_open(folder: Path, tmp_path: Path, loaded: tuple[Any, Any, Llava]) -> None:
    whole = save_image(tmp_path / "whole.png", "red", (300, 200)).read_bytes()
    for name, content in (("text.png", b"no image"), ("cut.png", whole[: len(whole) // 2]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ItemError, match=rf"here: .*{name} cannot be opened .*; fetch it again"):
            opened(tmp_path / name, "here")
    Image.new("L", (9, 9)).save(tmp_path / "grey.png")
    assert opened((tmp_path / "grey.png").read_bytes(), "here").mode == "RGB"


# --- answers


def test_answers_and_likelihoods_do_not_depend_on_the_batch(folder: Path, loaded: tuple[Any, Any, Llava]) -> None:
    model, _, form = loaded
    read = pools(folder)
    questions = [
        {"text": item["turns"][0][0], "image": item["image"], "where": "here"}
        for pool in read.values()
        for item in pool
    ]
    alone = form.answers(model, questions, 1, 6)
    assert form.answers(model, questions, 5, 6) == alone and len(set(alone)) > 1
    assert form.answers(model, questions[8:], 4, 6) == alone[8:]  # a batch without an image
    examples = form.encode(read, cut_at(2048)).examples
    one, many = form.nll(model, examples, 1), form.nll(model, examples, 5)
    assert [count for _, count in one] == [count for _, count in many]
    torch.testing.assert_close([value for value, _ in one], [value for value, _ in many], rtol=1e-4, atol=1e-4)
    # the likelihood is the model's own loss
    inputs = form.collate(examples[:1])
    loss = model(**inputs).loss.item()
    torch.testing.assert_close(loss, one[0][0] / one[0][1], rtol=1e-4, atol=0)


# --- folders and files


def test_folders_that_are_no_llava_of_clip(folder: Path, tmp_path: Path) -> None:
    import shutil

    for name, change, message in (
        ("token", {"image_token_id": 5, "image_token_index": 5}, "<image> has id .* in the tokenizer, 5 in config"),
        ("kind", {"model_type": "llama"}, "give a LLaVA"),
    ):
        shutil.copytree(folder / "model", tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(CheckpointError, match=message):
            open_llava(tmp_path / name)


GOOD = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "conversations": GOOD[:1]}, "a question without an answer"),
        ({"image": "a.png", "conversations": [GOOD[0], {"from": "gpt", "value": " "}]}, "a question without an answer"),
        ({"image": "a.png", "conversations": []}, "a question without an answer"),
        ({"conversations": GOOD}, "1 <image> and no image"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, GOOD[1]]},
            "one image and 0 <image>",
        ),
        ({"image": "a.png", "conversations": GOOD * 2}, "one image and 2 <image>"),
        ({"image": "b.png", "conversations": GOOD}, r"b\.png does not exist"),
        ({"image": "../a.png", "conversations": GOOD}, "no path below"),
        ({"image": 3, "conversations": GOOD}, "no path below"),
        ({"image": "a.png", "conversations": GOOD[::-1] + GOOD[1:] * 2}, "turn 2: expected a text of 'human'"),
        ({"image": "a.png", "conversations": "red"}, "expected a list of objects"),
        ("red", "expected an object"),
    ],
)
def test_a_row_that_cannot_be_used(row: Any, message: str, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", "red")
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": GOOD}, row]))
    with pytest.raises(ItemError, match=rf"mix\.json, item 1.*{message}"):
        read_conversations(file, tmp_path)
    file.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": GOOD[1:] + GOOD}]))
    (item,) = read_conversations(file, tmp_path)["image"]  # what gpt says unasked, first of all, is left out
    assert item["turns"] == [("<image>\nWhat?", "red")] and item["id"] == "1"


@pytest.mark.parametrize(
    ("text", "message"), [("[", "broken or truncated"), ("{}", "a list of conversations"), ("[]", "not empty")]
)
def test_a_file_that_is_no_mix(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text(text)
    with pytest.raises(ItemError, match=message):
        read_conversations(tmp_path / "mix.json", tmp_path)
    with pytest.raises(ItemError, match="cannot be read"):
        read_conversations(tmp_path / "none.json", tmp_path)
