"""LLaVA's form: conversations with at most one image to tokens and the mask of what is learnt; questions to answers.

Prompt and mask come from the tokenizer's own chat template (`models.llava.TEMPLATE`); an image is as many `<image>` as
it has tokens, and its pixels are read when a batch needs them. The processor of transformers gives the same for an item
with its image, and has to open it for that.

Shape suffixes: B items, T tokens of the longest of them (padded on the left), N images, C colours, H, W pixels.
"""

from __future__ import annotations

import array
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dora_lab.forms.decoder import answer_loss, labelled
from dora_lab.forms.form import IGNORED, Encoded, Form, Pools, refuse_beyond
from dora_lab.spec import Data, SpecError
from dora_lab.tasks.conversations import IMAGE, Item
from dora_lab.tasks.items import ItemError, UnreadableError
from dora_lab.tasks.limits import NO_LIMITS, Limits

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

AT_ONCE = 1000  # conversations tokenised in one call


@dataclass(frozen=True)
class Example:
    """One item: its pool, token ids, for each its label (the id itself, or IGNORED), and the file of its image."""

    task: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    image: Path | bytes | None
    where: str

    def content(self) -> bytes:
        """What is learnt, for a hash; of the image its name."""
        return array.array("q", [len(self.ids), *self.ids, *self.labels]).tobytes() + str(self.image).encode()


class Llava(Form):
    """The form for one processor (`models.llava.open_llava`).

    Raises ItemError where the tokenizer's mask of a probe is not its answers: then it would learn something else.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer, self.images, self.template = (
            processor.tokenizer, processor.image_processor, processor.chat_template,
        )  # fmt: skip
        side = self.images.crop_size["height"] // processor.patch_size
        # an image's tokens: a patch each, and CLIP's class token where that is not left out
        self.tokens = side * side + (processor.vision_feature_select_strategy == "full")
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        probe = {"turns": [(f"{IMAGE}\nA probe?", "Yes, one."), ("And text?", "No: 2")], "where": "probe"}
        (ids, mask) = next(self._coded([probe]))
        learnt = [self.tokenizer.decode(run).strip() for run in _runs(ids, mask)]
        wanted = [answer + self.tokenizer.eos_token for _, answer in probe["turns"]]
        if learnt != wanted or ids.count(self.image_id) != self.tokens:
            raise ItemError(
                f"the tokenizer masks {learnt} of a probe whose answers are {wanted}, with {ids.count(self.image_id)} "
                f"{IMAGE} where an image has {self.tokens}; give the tokenizer of LLaVA as tokenizer.json"
            )

    def encode(self, items: Pools, data: Data, tokenizer: Any = None, limits: Limits = NO_LIMITS) -> Encoded:
        """Examples of conversations, by pool; labels on the answers and their end of sequence, cut on the right.

        Raises ItemError, naming the item: where nothing that is learnt is left within `data.cutoff` tokens, or not the
        whole image is; SpecError for another `data.truncation` than "right", as released.
        """
        if data.truncation != "right":
            raise SpecError("data.truncation: LLaVA's items are cut on the right, as released; set it to 'right'")
        found, shortened, answers_cut, cutoff = [], 0, 0, data.cutoff
        for task, pool in items.items():
            for item, (ids, mask) in zip(pool, self._coded(pool), strict=True):
                if len(list(_runs(ids, mask))) != len(item["turns"]):
                    raise ItemError(f"{item['where']}: not every answer has tokens of its own; correct or remove it")
                refuse_beyond(ids[:cutoff], limits, item["where"])
                kept = mask[:cutoff]
                if not any(kept[1:]):
                    raise ItemError(
                        f"{item['where']}: no token of an answer is among its first {cutoff} (of {len(ids)}), so "
                        "nothing is learnt; raise data.cutoff or remove it"
                    )
                marks, due = ids[:cutoff].count(self.image_id), 0 if item["image"] is None else self.tokens
                if marks != due:
                    raise ItemError(
                        f"{item['where']}: {marks} {IMAGE} tokens within {cutoff}, its image has {due}; raise "
                        f"data.cutoff, or take {IMAGE} out of the text"
                    )
                shortened += len(ids) > cutoff
                answers_cut += any(mask[cutoff:])
                labels = [token if one else IGNORED for token, one in zip(ids, kept, strict=False)]
                labels[0] = IGNORED  # nothing predicts the first token
                found.append(Example(task, tuple(ids[:cutoff]), tuple(labels), item["image"], item["where"]))
        return Encoded(found, shortened, answers_cut)

    def question(self, item: Item) -> Example:
        """The prompt of {"text", "image", "where"}, up to where the answer begins; nothing in it is learnt."""
        (ids, _) = next(self._coded([{"turns": [(item["text"], None)], "where": item["where"]}]))
        return Example("", tuple(ids), (IGNORED,) * len(ids), item["image"], item["where"])

    def rests(self, examples: Sequence[Example]) -> bool:
        """True where some have no image: nothing of them goes through the projector.

        Released code shows it a black image there whose tokens nothing reads: with a gradient of zero AdamW's momentum
        still moves the projector. Here it rests.
        """
        return any(example.image is None for example in examples)

    def collate(self, examples: Sequence[Example], epochs: Sequence[int] = ()) -> dict[str, Tensor]:
        """Tensors (B, T) input_ids, attention_mask, position_ids and labels; pixel_values (N, C, H, W) if any image."""

        def padded(rows: Iterator[Sequence[int]], fill: int) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], True, fill, padding_side="left")

        mask_BT = padded(([1] * len(example.ids) for example in examples), 0)
        found = {
            "input_ids": padded((example.ids for example in examples), self.tokenizer.pad_token_id),
            "attention_mask": mask_BT,
            "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
            "labels": padded((example.labels for example in examples), IGNORED),
        }
        seen = [opened(example.image, example.where) for example in examples if example.image is not None]
        return found | ({"pixel_values": self.images(seen, return_tensors="pt")["pixel_values"]} if seen else {})

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled tokens."""
        return labelled(batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy in nats, summed over the labelled tokens."""
        return answer_loss(model, batch)

    @torch.no_grad()
    def answers(
        self, model: LlavaForConditionalGeneration, questions: Sequence[Item], batch_size: int, max_new_tokens: int
    ) -> list[str]:
        """The texts that the model answers, greedily, without special tokens and the blanks around them."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        how: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        texts: list[str] = []
        for inputs in self._batches(model, [self.question(item) for item in questions], batch_size):
            given = {name: value for name, value in inputs.items() if name not in ("labels", "position_ids")}
            found = cast(Any, model).generate(**given, **how, eos_token_id=end, pad_token_id=pad)
            texts += self.tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def nll(
        self, model: LlavaForConditionalGeneration, examples: Sequence[Example], batch_size: int
    ) -> list[tuple[float, int]]:
        """(negative log-likelihood in nats, number of tokens) of what is learnt of each example."""
        rows: list[tuple[float, int]] = []
        for inputs in self._batches(model, examples, batch_size):
            labels_BT = inputs.pop("labels")[:, 1:]
            logits: Any = model(**inputs, use_cache=False).logits[:, :-1]
            losses_BT = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
            )
            counts = labels_BT.ne(IGNORED).sum(1).tolist()
            rows += zip(losses_BT.double().sum(1).tolist(), counts, strict=True)
        return rows

    def _batches(
        self, model: LlavaForConditionalGeneration, examples: Sequence[Example], size: int
    ) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(examples), size):
            inputs = self.collate(examples[start : start + size])
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            yield {name: value.to(model.device) for name, value in inputs.items()}

    def _coded(self, items: Sequence[Item]) -> Iterator[tuple[list[int], list[int]]]:
        """(token ids, mask of what is learnt) of each item."""
        for start in range(0, len(items), AT_ONCE):
            said = [self._messages(item["turns"]) for item in items[start : start + AT_ONCE]]
            found = self.tokenizer.apply_chat_template(
                said, chat_template=self.template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            yield from zip(found["input_ids"], found["assistant_masks"], strict=True)

    def _messages(self, turns: Sequence[tuple[str, str | None]]) -> list[dict[str, str]]:
        said = []
        for question, answer in turns:
            said.append({"role": "user", "content": question.replace(IMAGE, IMAGE * self.tokens)})
            said += [] if answer is None else [{"role": "assistant", "content": answer}]
        return said


def opened(image: Path | bytes, where: str) -> Image.Image:
    """The picture of a file (or of its bytes) in three colours; UnreadableError names the item that it is of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
                return file.convert("RGB")
    except Exception as error:  # of any kind: every format has its own
        name = "its image" if isinstance(image, bytes) else str(image)
        raise UnreadableError(
            f"{where}: {name} cannot be opened ({type(error).__name__}: {error!s:.200}); fetch it again"
        ) from None


def _runs(ids: Sequence[int], mask: Sequence[int]) -> Iterator[list[int]]:
    """The tokens of each stretch that is masked."""
    for learnt, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        if learnt:
            yield [token for token, _ in run]
