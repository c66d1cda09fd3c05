"""VL-BART: the encoder reads a text and features of pictures, the decoder writes an answer (see `models.vl_bart`).
A clip is read as a picture whose regions are its frames.

As VL-Adapter (545fcbb, f1bbfd0) trains and asks it; what it does otherwise than one would think is a field of the spec:
the word before the text or behind it (`data.template`; "gpa: " is its own), texts and answers that lose their ends
(`data.cutoffs`), and the loss, a mean over items of the mean over their tokens times the score of the answer. Of
several answers to a question one is drawn at each pass over the items, as likely as its score; here from (seed, pass,
item) alone.

Shape suffixes: B items, T tokens of text, L tokens of an answer, P pictures of an item, R regions, F numbers of one,
V words.
"""

from __future__ import annotations

import array
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from dora_lab.forms.form import IGNORED, Encoded, Form, Pools, refuse_beyond
from dora_lab.io.limits import cutoffs
from dora_lab.spec import Data, Spec
from dora_lab.tasks import ItemError, Task, load_task
from dora_lab.tasks.limits import Limits
from dora_lab.tasks.pictures import Key, Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Target = tuple[tuple[int, ...], float]  # tokens of an answer, its score


@dataclass(frozen=True)
class PicturedExample:
    """One item: its text in tokens, its pictures, answers that may be drawn for it, and those whose NLL is told."""

    task: str
    name: str  # what its answers are drawn by
    ids: tuple[int, ...]
    pictures: tuple[Key, ...]
    targets: tuple[Target, ...]
    best: tuple[tuple[int, ...], ...]

    def content(self) -> bytes:
        """What is learnt, for a hash."""
        scores = array.array("d", [score for _, score in self.targets]).tobytes()
        answers = [number for ids, _ in self.targets for number in (len(ids), *ids)]
        shown = "\0".join((self.name, *(text for key in self.pictures for text in key))).encode()
        return array.array("q", [len(self.ids), *self.ids, *answers]).tobytes() + scores + shown


@dataclass(frozen=True)
class VLBartForm(Form):
    """How VL-BART is fed."""

    pictures: Pictures
    loss_of: str  # `data.loss`
    seed: int
    pad: int  # ids of tokens
    end: int
    start: int  # what the decoder begins with
    masks_padding: bool = False  # of clips

    @staticmethod
    def of(spec: Spec, model: Any, tokenizer: PreTrainedTokenizerBase, pictures: Pictures) -> VLBartForm:
        """The form of a run."""
        pad, end = cast(int, tokenizer.pad_token_id), cast(int, tokenizer.eos_token_id)
        start, masks = model.config.decoder_start_token_id, spec.data.padding == "masked"
        return VLBartForm(pictures, spec.data.loss, spec.seed, pad, end, start, masks)

    def encode(self, items: Pools, data: Data, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
        examples: list[PicturedExample] = []
        shortened = answers_cut = unanswered = questions_cut = 0
        for task, pool in items.items():
            text_limit, answer_limit = cutoffs(data.cutoffs).get(task, (data.cutoff, data.cutoff))
            asked = [prompt(load_task(task), data.template, item) for item in pool]
            texts = self._coded(tokenizer, asked)
            for number, (item, ids) in enumerate(zip(pool, texts, strict=True)):
                where = f"item {item['id']} of {task}"
                targets, best = item["targets"], item["best"]
                answers = self._coded(tokenizer, [*targets, *best])
                unanswered += not targets
                if len(ids) > text_limit:
                    shortened += 1
                    head = _up_to_question(item, asked[number])
                    questions_cut += len(self._coded(tokenizer, [head])[0]) > text_limit
                answers_cut += any(len(answer) > answer_limit for answer in answers)
                kept = [self._cut(answer, answer_limit) for answer in answers]
                scored = tuple(zip(kept[: len(targets)], targets.values(), strict=True))
                for tokens in (cut := self._cut(ids, text_limit), *kept):
                    refuse_beyond(tokens, limits, where)
                examples.append(
                    PicturedExample(task, f"{task} {number}", cut, item["pictures"], scored, (*kept[len(targets) :],))
                )
        return Encoded(examples, shortened, answers_cut, unanswered, questions_cut)

    def learnt(self, encoded: Encoded) -> Encoded:
        """What is trained on: with loss "scored" all (an item without an answer counts, as "" of score 0), else those
        that have an answer. Raises ItemError where none has one."""
        left = [example for example in encoded.examples if example.targets]
        if not left:
            raise ItemError("no training item has an answer with a score; give other annotations, or other data.tasks")
        return encoded if self.loss_of == "scored" else replace(encoded, examples=left)

    def collate(self, examples: Sequence[Any], epochs: Sequence[int]) -> dict[str, Tensor]:
        """`batch` with the answers that are drawn at these passes over the items."""
        drawn = [self._draw(example, epoch) for example, epoch in zip(examples, epochs, strict=True)]
        return self.batch(examples, drawn)

    def batch(self, examples: Sequence[PicturedExample], targets: Sequence[Target]) -> dict[str, Tensor]:
        """`inputs`, `decoder_input_ids` and `labels` (B, L), `scores` (B)."""
        length = max(len(ids) for ids, _ in targets)
        labels_BL = torch.tensor([[*ids, *[IGNORED] * (length - len(ids))] for ids, _ in targets])
        shifted_BL = labels_BL.masked_fill(labels_BL == IGNORED, self.pad).roll(1, dims=1)
        shifted_BL[:, 0] = self.start
        scores_B = torch.tensor([score for _, score in targets], dtype=torch.float32)
        return self.inputs(examples) | {"decoder_input_ids": shifted_BL, "labels": labels_BL, "scores": scores_B}

    def inputs(self, examples: Sequence[PicturedExample]) -> dict[str, Tensor]:
        """What the encoder reads: `input_ids` (B, T), `attention_mask` (B, T + P x R), `features` (B, P, R, F)."""
        length = max(len(example.ids) for example in examples)
        gaps = [length - len(example.ids) for example in examples]
        ids_BT = torch.tensor([[*example.ids, *[self.pad] * gap] for gap, example in zip(gaps, examples, strict=True)])
        features = np.stack([self.pictures.of(example.pictures) for example in examples])
        features_BPRF = torch.from_numpy(features.astype(np.float32))
        text_BT = torch.tensor([[1] * (length - gap) + [0] * gap for gap in gaps])
        hidden = np.stack([self.pictures.padded(example.pictures) for example in examples]) & self.masks_padding
        seen_BS = torch.from_numpy(~hidden).flatten(1).long()
        return {"input_ids": ids_BT, "attention_mask": torch.cat([text_BT, seen_BS], 1), "features": features_BPRF}

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Labelled tokens with `data.loss` token_mean, else items."""
        return int(batch["labels"].ne(IGNORED).sum()) if self.loss_of == "token_mean" else len(batch["labels"])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy in nats, summed over tokens or items as `data.loss` says."""
        nll_BL = token_nll(model, batch)
        if self.loss_of == "token_mean":
            return nll_BL.sum()
        item_B = nll_BL.sum(1) / batch["labels"].ne(IGNORED).sum(1)
        return (item_B * batch["scores"]).sum() if self.loss_of == "scored" else item_B.sum()

    def _draw(self, example: PicturedExample, epoch: int) -> Target:
        if len(example.targets) < 2:
            return example.targets[0] if example.targets else self._nothing
        weights = [score for _, score in example.targets]
        return random.Random(f"{self.seed} answer {example.name} {epoch}").choices(example.targets, weights)[0]

    @property
    def _nothing(self) -> Target:
        """The empty answer, of score 0."""
        return (self.end,), 0.0

    def _coded(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
        return cast(Any, tokenizer(texts))["input_ids"] if texts else []

    def _cut(self, ids: list[int], limit: int) -> tuple[int, ...]:
        """The text's first tokens and its end, `limit` in all."""
        return tuple(ids) if len(ids) <= limit else (*ids[: limit - 1], self.end)


def prompt(task: Task, template: str, item: Mapping[str, Any]) -> str:
    """What the encoder reads of an item: its text, and the word that says the task."""
    return task.asked(template, item["text"])


def _up_to_question(item: Mapping[str, Any], asked: str) -> str:
    """What is read of an item up to the end of its question, which is its whole text where it does not say."""
    return asked[: asked.index(item["text"]) + len(item.get("question", item["text"]))]


def token_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, L) -log p in nats of every labelled token, 0 elsewhere."""
    rest = {name: value for name, value in batch.items() if name not in ("labels", "scores")}
    logits_BLV = model(**rest, use_cache=False).logits
    labels_BL = batch["labels"]
    nll = F.cross_entropy(logits_BLV.float().flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view_as(labels_BL)


def settings(spec: Spec, task: str, form: VLBartForm, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How answers are searched: the spec's fields, and everything else that transformers has a say in, said.

    The last token that fits is made the end of the answer, as transformers 4.2.1 did for BART.
    """
    asked = spec.evaluation
    beams = {name: int(number) for name, _, number in (text.rpartition("=") for text in asked.task_beams)}
    return GenerationConfig(
        max_new_tokens=asked.max_new_tokens,
        num_beams=beams.get(task, asked.num_beams),
        no_repeat_ngram_size=asked.no_repeat_ngram_size,
        early_stopping=asked.early_stopping,
        do_sample=False,
        length_penalty=1.0,
        repetition_penalty=1.0,
        min_length=0,
        num_return_sequences=1,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=form.end,
        pad_token_id=form.pad,
        decoder_start_token_id=form.start,
        forced_eos_token_id=form.end,
    )


@torch.no_grad()
def texts(model: Any, form: VLBartForm, tokenizer: Any, how: GenerationConfig, some: Sequence[Any]) -> list[str]:
    """The answer that the model writes to each example; the model's own settings are `how` while it writes."""
    inputs = {name: value.to(model.device) for name, value in form.inputs(some).items()}
    model.generation_config = how  # what is given beside it would be filled up from the folder's
    encoded = model.get_encoder()(**inputs)
    ids_BL = model.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"])
    return tokenizer.batch_decode(ids_BL, skip_special_tokens=True, clean_up_tokenization_spaces=True)


@torch.no_grad()
def logits(
    model: Any, form: VLBartForm, tokenizer: Any, words: Sequence[str], some: Sequence[Any]
) -> list[dict[str, float]]:
    """Of each example the logits of these words' first tokens, at the first place of an answer (behind its begin)."""
    firsts = [first_token(tokenizer, word) for word in words]
    inputs = {name: value.to(model.device) for name, value in form.inputs(some).items()}
    begun = torch.tensor([[form.start, tokenizer.bos_token_id]] * len(some), device=model.device)
    logits_BV = model(**inputs, decoder_input_ids=begun, use_cache=False).logits[:, -1]
    return [dict(zip(words, row, strict=True)) for row in logits_BV[:, firsts].double().tolist()]


def first_token(tokenizer: Any, word: str) -> int:
    """The first token of a word that begins an answer."""
    return tokenizer(word, add_special_tokens=False)["input_ids"][0]


@torch.no_grad()
def nll(model: Any, form: VLBartForm, some: Sequence[PicturedExample]) -> list[float]:
    """Of each example -log p per token of its best answer, in nats; of several, the mean over them."""
    pairs = [(example, (ids, 1.0)) for example in some for ids in example.best]
    batch = form.batch([example for example, _ in pairs], [target for _, target in pairs])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    values_B = (token_nll(model, batch).double().sum(1) / batch["labels"].ne(IGNORED).sum(1)).tolist()
    found, at = [], 0
    for example in some:
        found.append(sum(values_B[at : at + len(example.best)]) / len(example.best))
        at += len(example.best)
    return found
