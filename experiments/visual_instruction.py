"""LLaVA-1.5 by FT, LoRA and DoRA on visual instructions: tables 4 and 12.

    dora-lab run visual_instruction                              # mini: 45 runs of a sweep, 44 at the rates it chose
    dora-lab reproduce visual_instruction                        # seed 0 of each row
    dora-lab join-llava VICUNA CLIP PROJECTOR llava-1.5-7b-base --allow-pickle
    dora-lab run visual_instruction --tier paper --dry-run       # 9 runs: what they need
    torchrun --nproc-per-node 8 -m dora_lab run visual_instruction --tier paper --data-dir playground/data \\
        --model-dir llava-1.5-7b-base --shard --recompute

mini: the embedded LLaVA (`dora_lab.mini.llava`: a frozen encoder, a language model that has read prose alone, a
projector trained on descriptions) and its world (source `mini_llava`: conversations and benchmarks as files in LLaVA's
layout, read by the paper tier's readers). Trained on short answers about pictures and, one step in ten, conversations
in prose; asked of mini-VQA (`vqav2_val`) and of three that it is not trained on: mini-VizWiz (photographs with faults,
"Unanswerable"), mini-SQA (letters, half without a picture), mini-POPE (yes and no). Of these forms the language model
has read in prose. Rows as below at rank 16, float32; a blind row (all pictures grey) and the untrained base beside. A
sweep of three seeds chooses the rate of all but the projector on mini-VQA alone. What is claimed:
registered/visual_instruction.md.
Beside them, without a claim, the same rows at the same rates on pictures and questions that are not ours, three seeds
(source `easy_vqa`).

paper: vicuna-7b-v1.5 with CLIP-L/14 at 336 pixels and the projector that LLaVA released for them, joined in one folder;
the mix of 665 thousand conversations, one pass. A folder as LLaVA lays it out: `llava_v1_5_mix665k.json`, the images
that it names, and `eval/`. Rows, each with three seeds (the paper has one run of each):

    ft      language model and projector at 2e-5, the tower frozen; quoted by the paper from LLaVA
    lora    r 128, alpha 256, dropout 0.05 on the seven matrices of every layer of the language model, 2e-4; the
            projector whole, 2e-5; quoted from LLaVA, too
    dora    the same, with a magnitude

Steps of 128 conversations with an image or 128 without, cosine after 3 % of warm-up, no decay, 2,048 tokens. Weights,
their steps and AdamW's moments are float32 and products bfloat16, as with DeepSpeed's bf16; merged into float16 for the
evaluation, as released. --shard and --recompute change the memory, not the numbers.

VQAv2 (test-dev) and VizWiz (test) are scored by servers: their answers are in `samples/*.submission.json`; so are
MMBench's (development set), whose answers are in its file, so that it is scored here, too, by letters and words alone,
where the server asks a language model about what it cannot read. On the validation sets of VQAv2 and VizWiz the same
rules are at work here: `--with data.tasks=vqav2_val,vizwiz_val,...`. SQA is the share of right answers where there is
an image, POPE the mean F1 of its three parts.

What differs from the released code, on purpose: everything random comes from the seed; the order is shuffled within a
modality, without LLaVA's groups of one length (a step's micro-batches are sorted by it); the projector rests in steps
without images (see `forms.llava`); an item of which nothing could be learnt is refused, by name: the released code
drops its labels ("tokenization mismatch").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Spec

TIERS = ("mini", "paper")
SEEDS = (0, 1, 2)
TASKS = ("vqav2_test_dev", "gqa_testdev", "vizwiz_test", "science_qa", "text_vqa", "pope", "mmbench")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ITEMS = {"llava_v1_5": 665_298}  # as widely quoted: 624,610 with an image, 40,688 without
BASE = "llava-1.5-7b-base"  # a folder that `dora-lab join-llava` writes, never a LLaVA that is tuned already
PAPER_MODEL = "LLaVA-1.5-7B"  # what the paper calls what is tuned from it
BATCH, MICRO = 128, 4
PROJECTOR = "multi_modal_projector"

MINI_TASKS = ("vqav2_val", "vizwiz_val", "science_qa", "pope")
TRAINED_ON = MINI_TASKS[:1]  # of what is asked; the others are not looked at before the rates are chosen
MINI_RANK = 16  # of a width of 128: an eighth; the paper's 128 of 4096 is a thirty-second, too little here
MINI_BATCH = 16  # conversations of a step
EPOCHS = 3.0  # 450 steps about pictures, 45 in prose
PROJECTOR_RATE = 1e-3  # in every row
SWEEP_SEEDS, VALIDATION_ITEMS = (100, 101, 102), 256  # of one, a skill that it caught in time or not chose the rate
MIDDLE = {"ft": 3e-4, "lora": 1e-3, "dora": 1e-3}
STEPS = (1 / 3, 1, 3, 9, 27)  # of the middle: the same number of tries for every row; 27: FT's lowest was at 9
BLIND_SEEDS = EASY_SEEDS = (0, 1, 2)
EASY_TASKS = ("easy_vqa_yes_no", "easy_vqa_other")
EASY_EPOCHS, EASY_ITEMS = 2.0, 1000  # 438 steps; test questions of each kind
# row: what the sweep chose (results/tables/rates), frozen before any run of `confirmation`
RATES: dict[str, float] = {"ft": 0.0016, "lora": 0.0025, "dora": 0.0032}


def specs(tier: str) -> list[Spec]:
    """All runs of a tier."""
    return [*sweep(), *confirmation()] if tier == "mini" else paper()


def sweep() -> list[Spec]:
    """Every row at every rate of its grid, three seeds, a third of the steps, on validation items of mini-VQA."""
    rates = [(row, float(f"{MIDDLE[row] * step:.4g}")) for step in STEPS for row in ROWS]
    return [swept(row, rate, seed) for seed in SWEEP_SEEDS for row, rate in rates]


def confirmation(seeds: Sequence[int] = range(10)) -> list[Spec]:
    """Every row at its rate, seed by seed, what an untrained and a blind model score, and the second source."""
    rows = [mini(row, rate, seed) for seed in seeds for row, rate in RATES.items()]
    if not rows:
        return []
    base, *second = untrained(rows[0]), untrained(easy(rows[0]))
    second += [easy(spec) for spec in rows if spec.seed in EASY_SEEDS]
    grey = [blind(spec) for spec in rows if spec.method.name == "ft" and spec.seed in BLIND_SEEDS]
    return [base, *rows, *grey, *second]


def reproduced() -> list[Spec]:
    """What `dora-lab reproduce` runs: seed 0 of each row; before the rates are chosen, what `quick` has."""
    return [spec for spec in confirmation([0]) if spec.data.name == "mini_llava" and spec.optim is not None] or quick()


def quick() -> list[Spec]:
    """With QUICK=1: two short runs of the sweep."""
    return [swept(row, MIDDLE[row], SWEEP_SEEDS[0]) for row in ("ft", "dora")]


def mini(row: str, rate: float, seed: int, epochs: float = EPOCHS) -> Spec:
    """One run of tier mini."""
    return Spec(
        experiment="visual_instruction",
        tier="mini",
        seed=seed,
        model=Model(name="mini_llava", family="llava"),
        data=Data(name="mini_llava", tasks=MINI_TASKS, template="published", cutoff=512, truncation="right"),
        method=ROWS[row],
        optim=Optim(
            learning_rate=rate,
            schedule="cosine",
            warmup_steps=0,
            warmup_fraction=0.03,
            batch_size=MINI_BATCH,
            micro_batch_size=MINI_BATCH,
            epochs=epochs,
            groups=(f"{PROJECTOR}={PROJECTOR_RATE / rate:.4g}",),
            task_batch_sizes=(f"image={MINI_BATCH}", f"text={MINI_BATCH}"),
        ),
        probe=None,
        evaluation=Evaluation(num_beams=1, max_new_tokens=4, batch_size=64),
    )


def swept(row: str, rate: float, seed: int) -> Spec:
    """The same run on a third of the steps, scored on validation items of what it is trained on."""
    spec = mini(row, rate, seed, float(f"{EPOCHS / 3:.4g}"))
    return replace(
        spec,
        data=replace(spec.data, tasks=TRAINED_ON, validation_items=VALIDATION_ITEMS),
        evaluation=replace(spec.evaluation, split="validation"),
    )


def blind(spec: Spec) -> Spec:
    """The same training and questions, all pictures grey."""
    return replace(spec, data=replace(spec.data, name="mini_llava_blind"))


def easy(spec: Spec) -> Spec:
    """The same row on easy-vqa's pictures and questions: no prose in it."""
    assert spec.optim is not None
    steps = {"epochs": EASY_EPOCHS, "task_batch_sizes": (f"image={MINI_BATCH}",)}
    return replace(
        spec,
        data=replace(spec.data, name="easy_vqa", tasks=EASY_TASKS, test_items=EASY_ITEMS),
        optim=replace(spec.optim, **steps),
        evaluation=replace(spec.evaluation, max_new_tokens=8),  # "rectangle" is three, "brown" four
    )


def untrained(spec: Spec) -> Spec:
    """The base on what a run is asked."""
    return replace(spec, method=Method(name="base"), optim=None, seed=0)


def paper() -> list[Spec]:
    """Every row with every seed, seed by seed."""
    rows = (
        (FT, 2e-5, ()),
        (adapter("lora"), 2e-4, (f"{PROJECTOR}=0.1",)),
        (adapter("dora"), 2e-4, (f"{PROJECTOR}=0.1",)),
    )
    return [trained(method, rate, groups, seed) for seed in SEEDS for method, rate, groups in rows]


def adapter(name: str, rank: int = 128, dropout: float = 0.05) -> Method:
    """LoRA or DoRA on the seven matrices of the language model; the projector trains whole, the tower is still."""
    return Method(
        name=name,
        rank=rank,
        alpha=2.0 * rank,
        dropout=dropout,
        target_modules=SEVEN,
        scope="language_model",
        also_train=(PROJECTOR,),
    )


FT = Method(name="ft", scope="^(?!.*vision_tower)")
ROWS = {"ft": FT, "lora": adapter("lora", MINI_RANK), "dora": adapter("dora", MINI_RANK)}  # of tier mini


def trained(method: Method, rate: float, groups: tuple[str, ...], seed: int) -> Spec:
    """One run of tier paper."""
    return Spec(
        experiment="visual_instruction",
        tier="paper",
        seed=seed,
        model=Model(name=BASE, family="llava"),
        data=Data(name="llava_v1_5", tasks=TASKS, template="published", cutoff=2048, truncation="right"),
        method=method,
        optim=Optim(
            learning_rate=rate,
            schedule="cosine",
            warmup_steps=0,
            warmup_fraction=0.03,
            batch_size=BATCH,
            micro_batch_size=MICRO,
            epochs=1.0,
            groups=groups,
            task_batch_sizes=(f"image={BATCH}", f"text={BATCH}"),
            products="bfloat16",
        ),
        probe=None,
        evaluation=Evaluation(
            num_beams=1,
            max_new_tokens=128,
            task_new_tokens=("science_qa=1024", "mmbench=1024"),
            batch_size=8,
            weights="merged",
            dtype="float16",
        ),
    )
