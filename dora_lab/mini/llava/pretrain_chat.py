"""How the language model is made that becomes a LLaVA: Llama of 4 layers x 128, taught by conversations in prose alone.

As Vicuna, it has never seen a picture. Its gate: from prose it answers in each of LLaVA's forms.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_lab.mini.llava import corpus
from dora_lab.mini.llava.talk import LETTERS, NO_ANSWER, Turn
from dora_lab.mini.llava.views import WORDS
from dora_lab.mini.vl.pretrain import apart, optimizers
from dora_lab.mini.vl.questions import plural
from dora_lab.mini.vl.scenes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES

PICKING_FIRST = 3_072  # conversations that only ask for a word about one thing: the rest builds on that
BATCH, POOL = 8, 32  # conversations of a step; steps whose documents are sorted by length together
GUIDED = 0.75  # share of the steps in which heads are shown where to look
LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
SYSTEM = (  # vicuna_v1, see `models.llava`
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
USER, ASSISTANT = "USER: ", " ASSISTANT:"


def make_tokenizer(n_documents: int = 3_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the world is one token and every digit is alone."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?[A-Za-z]+| ?[^A-Za-z\d\s]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=[AddedToken(name, normalized=False, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=50,
    )  # fmt: skip
    texts = [
        text
        for number in range(n_documents)
        for turn in corpus.document(number, picking=False)
        for text in (f"{USER}{turn.text}{ASSISTANT}", f" {turn.answer}", f"\n{turn.answer}")
    ]
    rare = [*(f" {word}" for word in (*WORDS, *map(plural, SHAPES), *range(10))), " Is there a star in the image?"]
    texts += [SYSTEM, " Yes", " No", *rare] * 200
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=LLAMA["max_position_embeddings"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Batch(NamedTuple):
    """B conversations of T tokens, padded on the right; each token's bits, part, turn, and those it has to look at."""

    ids_BT: Tensor
    labels_BT: Tensor  # -100 where nothing is learnt
    things_BT: Tensor  # bits of what a token is about
    piece_BT: Tensor  # number of the piece of text that it is of; 0: of none
    part_BT: Tensor  # 0 other, 1 told, 2 named, 3 option, 4 the right option
    turn_BT: Tensor
    telling_BT: Tensor  # is it one of the words that tell things apart?
    due_BT: Tensor  # bits of the evidence, where the next token is of an answer
    kinds: list[list[str]]


PARTS = {"": 0, "told": 1, "named": 2, "option": 3}


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[list[Turn]], answered: bool = True) -> Batch:
    """Conversations as tensors; not `answered`: up to where the last answer begins."""
    whole, marks = [], []
    for turns in conversations:
        text, at = "<s>" + SYSTEM, [(3 + len(SYSTEM), 0, 0, 0, 0, 0)]  # length, bits, piece, part, turn, is answer
        pieces = 0
        for number, turn in enumerate(turns, 1):
            said = [(USER, 0, 0)] + [(p.text, p.bits, PARTS[p.part] + p.right) for p in turn.said] + [(ASSISTANT, 0, 0)]
            for part_text, bits, part in said:
                pieces += 1
                text += part_text
                at.append((len(part_text), bits, pieces if bits else 0, part, number, 0))
            if answered or number < len(turns):
                answer = f" {turn.answer}</s>"
                text += answer
                at.append((len(answer), turn.evidence, 0, 0, number, 1))
        whole.append(text)
        marks.append(np.repeat(np.array([row[1:] for row in at]), [row[0] for row in at], axis=0))
    coded = tokenizer.backend_tokenizer.encode_batch(whole, add_special_tokens=False)
    B, T = len(whole), max(len(e.ids) for e in coded)
    ids, found = np.full((B, T), LLAMA["pad_token_id"]), np.zeros((B, T, 5), np.int64)
    for row, (e, mark) in enumerate(zip(coded, marks, strict=True)):
        ids[row, : len(e.ids)] = e.ids
        found[row, : len(e.ids)] = mark[np.asarray([end - 1 for _, end in e.offsets])]
    ids_BT, marks_BT5 = torch.from_numpy(ids), torch.from_numpy(found)
    answer_BT = marks_BT5[..., 4].bool()
    bits_BT = marks_BT5[..., 0]
    due_BT = torch.zeros_like(bits_BT)
    due_BT[:, :-1] = (bits_BT * answer_BT)[:, 1:]
    piece_BT, part_BT, turn_BT = (marks_BT5[..., k] for k in (1, 2, 3))
    return Batch(
        ids_BT=ids_BT,
        labels_BT=ids_BT.masked_fill(~answer_BT, -100),
        things_BT=bits_BT * ~answer_BT,
        piece_BT=piece_BT,
        part_BT=part_BT,
        turn_BT=turn_BT,
        telling_BT=torch.isin(ids_BT, telling(tokenizer)) & piece_BT.ne(0),
        due_BT=due_BT,
        kinds=[[turn.kind if turn.answer != NO_ANSWER else "none" for turn in turns] for turns in conversations],
    )


def telling(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Ids of the words that tell things apart: their colours, shapes, sizes, places, the signs' words, the letters."""
    words = [*COLOURS, *SHAPES, *map(plural, SHAPES), *SIZES, *ROWS, *COLUMNS, *WORDS, "sign"]
    return torch.tensor(cast("list[int]", tokenizer.convert_tokens_to_ids([*(f"Ġ{word}" for word in words), *LETTERS])))


def batches(tokenizer: PreTrainedTokenizerFast, first: int) -> Iterator[Batch]:
    """Batches from document `first` on, which is a multiple of a pool; of one length each, as far as that goes."""
    size = BATCH * POOL
    while True:
        pool = [corpus.document(number, number < PICKING_FIRST) for number in range(first, first + size)]
        pool.sort(key=lambda turns: sum(len(turn.text) + len(turn.answer) for turn in turns))
        order = list(range(0, size, BATCH))
        Random(f"pool/{first}").shuffle(order)
        yield from (encode(tokenizer, pool[at : at + BATCH]) for at in order)
        first += size


def guidance(attentions: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """A loss that shows heads where to look (as in `mini.vl.pretrain`): else picking by name stays at chance.

    In the first two layers two heads look from the end of a sentence, name or option at the telling words of it; in
    the second and third head 1 looks from an option's end, and from where an answer begins, at the name in the
    question; in the last two head 0 looks from all three at the end of what is told of it; in the last head 2 from the
    answer at the end of the right option. At ends, because no earlier word knows what will follow.
    """
    T = batch.ids_BT.shape[1]
    before_TT = torch.ones(T, T, dtype=torch.bool).tril()
    told_BT, named_BT, option_BT = batch.part_BT.eq(1), batch.part_BT.eq(2), batch.part_BT.ge(3)
    answers_BT = torch.zeros_like(told_BT)
    answers_BT[:, :-1] = batch.labels_BT[:, 1:].ne(-100)
    own_BTT = _own(batch) & ends(batch)[:, :, None]
    same_turn_BTT = batch.turn_BT[:, :, None].eq(batch.turn_BT[:, None]) & before_TT
    end_BT = ends(batch)
    asking_BT1 = (answers_BT | option_BT & end_BT)[:, :, None]
    naming_BTT = same_turn_BTT & named_BT[:, None] & asking_BT1
    wanted_BT = torch.where(answers_BT, batch.due_BT, batch.things_BT * ((named_BT | option_BT) & end_BT))
    looking_BTT = (wanted_BT[:, :, None] & batch.things_BT[:, None]).ne(0) & (told_BT & end_BT)[:, None]
    right_BTT = same_turn_BTT & (batch.part_BT.eq(4) & end_BT)[:, None] & answers_BT[:, :, None]
    a = attentions
    pairs = (
        (a[0][:, 0], own_BTT), (a[0][:, 1], own_BTT), (a[1][:, 0], own_BTT), (a[1][:, 3], own_BTT),
        (a[1][:, 1], naming_BTT), (a[2][:, 1], naming_BTT),
        (a[2][:, 0], looking_BTT), (a[3][:, 0], looking_BTT), (a[3][:, 2], right_BTT),
    )  # fmt: skip
    return torch.stack([apart(attention, wanted) for attention, wanted in pairs]).sum()


def own_words(model: LlamaForCausalLM, hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """How badly the end of a sentence, name or option tells, after two layers, the telling words of it, evenly.

    Without it a head that looks at the right sentence finds nothing there to read.
    """
    end_BT = ends(batch)
    words_NT = _own(batch)[end_BT].float()
    rows_N = end_BT.nonzero()[:, 0]
    logits_NV = model.lm_head(model.model.norm(hidden_BTH[end_BT])).float()
    logs_NT = logits_NV.log_softmax(1).gather(1, batch.ids_BT[rows_N])
    return -((logs_NT * words_NT).sum(1) / words_NT.sum(1).clamp_min(1)).mean()


def _own(batch: Batch) -> Tensor:
    """(B, T, T): is the second token a telling word of the first's sentence, name or option?"""
    return batch.piece_BT[:, :, None].eq(batch.piece_BT[:, None]) & batch.telling_BT[:, None]


def ends(batch: Batch) -> Tensor:
    """(B, T): is a token the last of a sentence, name or option?"""
    end_BT = batch.piece_BT.ne(0)
    end_BT[:, :-1] &= batch.piece_BT[:, :-1].ne(batch.piece_BT[:, 1:])
    return end_BT


def make_model(words: int) -> LlamaForCausalLM:
    """A Llama of the base's sizes with so many words; random."""
    config = LlamaConfig(**LLAMA, vocab_size=words)
    config._attn_implementation = "eager"  # the guided heads' probabilities are needed
    return LlamaForCausalLM(config)


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over 100 steps, level, over the last 40 % down to 2 %."""
    return min(1.0, (step + 1) / 100, 0.02 + 0.98 * (steps - step) / (0.4 * steps))


def pretrain(
    steps: int, learning_rate: float = 0.003, seed: int = 0, out: Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """The model after `steps` batches, its tokenizer and a record. out: a folder for checkpoints, to go on from."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer)).train()
    both = optimizers(cast(Any, model), learning_rate)
    step, log, spent = 0, list[dict[str, Any]](), 0.0
    saved = out and out / "chat.pt"
    if saved and saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        for optimizer, held in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        step, log, spent = state["step"], state["log"], state["seconds"]
    began = time.time() - spent
    stream = batches(tokenizer, step // POOL * POOL * BATCH)
    for _ in range(step % POOL):
        next(stream)
    right: defaultdict[str, list[bool]] = defaultdict(list)
    while step < steps:
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate(step, steps)
        batch = next(stream)
        value, hits = learn(model, batch, step < GUIDED * steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        for kinds, some in zip(batch.kinds, hits, strict=True):
            for kind, hit in zip(kinds, some, strict=True):
                right[kind].append(hit)
        if step % 100 == 0:
            row = {"step": step, "loss": round(value, 4), "seconds": round(time.time() - began, 1)}
            row |= {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}
            right.clear()
            log.append(row)
            print(json.dumps(row), flush=True)
        if saved and step % 100 == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in both], "step": step}
            torch.save(state | {"log": log, "seconds": time.time() - began}, saved)
    record = {
        "steps": steps, "batch": BATCH, "peak_learning_rate": learning_rate, "seed": seed,
        "documents": steps * BATCH, "seconds": round(time.time() - began, 1),
        "parameters": sum(p.numel() for p in model.parameters()), "log": log[::10] + log[-1:],
    }  # fmt: skip
    return model.eval(), tokenizer, record


def learn(model: LlamaForCausalLM, batch: Batch, guided: bool) -> tuple[float, list[list[bool]]]:
    """Forward and backward of one batch: its loss (nats a token of the answers), and of every turn whether each token
    of its answer is the likeliest, given those before it."""
    mask_BT = batch.ids_BT.ne(LLAMA["pad_token_id"])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            input_ids=batch.ids_BT, attention_mask=mask_BT, use_cache=False, output_attentions=guided,
            output_hidden_states=True,
        )  # fmt: skip
        words = own_words(model, output.hidden_states[2], batch)
    logits_BTV = output.logits[:, :-1].float()
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch.ids_BT[:, 1:], reduction="none")
    said_BT = batch.labels_BT[:, 1:].ne(-100)
    loss = losses_BT[said_BT].mean()
    prose = losses_BT[~said_BT & mask_BT[:, 1:]].mean()
    (loss + 0.1 * prose + 0.3 * words + (0.1 * guidance(output.attentions, batch) if guided else 0.0)).backward()
    wrong_BT = logits_BTV.argmax(2).ne(batch.ids_BT[:, 1:]) & said_BT
    found = []
    for row, kinds in enumerate(batch.kinds):
        wrong = set(batch.turn_BT[row, 1:][wrong_BT[row]].tolist())
        found.append([number not in wrong for number in range(1, len(kinds) + 1)])
    return loss.item(), found


@torch.no_grad()
def gate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Share of right answers to `count` unread questions of each form and kind, generated greedily."""
    return {
        f"{form} {kind}": sum(answers(model, tokenizer, form, kind, count)) / count
        for form, kinds in corpus.KINDS.items()
        for kind in dict.fromkeys(kinds)
    }


def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, form: str, kind: str, count: int
) -> list[bool]:
    """Is the generated answer to each question of a form and kind the right one?"""
    asked = [corpus.exam(form, kind, number) for number in range(count)]
    found: list[bool] = []
    for start in range(0, count, 100):
        some = asked[start : start + 100]
        batch = encode(tokenizer, some, answered=False)
        lengths_B = batch.ids_BT.ne(LLAMA["pad_token_id"]).sum(1)
        T = batch.ids_BT.shape[1]
        shifted_BT = torch.stack([row.roll(T - int(n)) for row, n in zip(batch.ids_BT, lengths_B, strict=True)])
        said = cast(Any, model).generate(
            input_ids=shifted_BT, attention_mask=shifted_BT.ne(LLAMA["pad_token_id"]), max_new_tokens=6,
            do_sample=False,
        )  # fmt: skip
        texts = tokenizer.batch_decode(said[:, T:], skip_special_tokens=True)
        found += [text.strip() == turns[0].answer for text, turns in zip(texts, some, strict=True)]
    return found
