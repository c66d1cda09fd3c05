"""LLaVA-1.5 by FT, LoRA and DoRA on visual instructions: tables 4 and 12.

    dora-lab join-llava VICUNA CLIP PROJECTOR llava-1.5-7b-base --allow-pickle
    dora-lab run visual_instruction --dry-run                    # 9 runs: what they need
    torchrun --nproc-per-node 8 -m dora_lab run visual_instruction --tier paper --data-dir playground/data \\
        --model-dir llava-1.5-7b-base --shard --recompute

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

from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Spec

TIERS = ("paper",)
SEEDS = (0, 1, 2)
TASKS = ("vqav2_test_dev", "gqa_testdev", "vizwiz_test", "science_qa", "text_vqa", "pope", "mmbench")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ITEMS = {"llava_v1_5": 665_298}  # as widely quoted: 624,610 with an image, 40,688 without
BASE = "llava-1.5-7b-base"  # a folder that `dora-lab join-llava` writes, never a LLaVA that is tuned already
PAPER_MODEL = "LLaVA-1.5-7B"  # what the paper calls what is tuned from it
BATCH, MICRO = 128, 4
PROJECTOR = "multi_modal_projector"


def specs(tier: str) -> list[Spec]:
    """Every row with every seed, seed by seed."""
    rows = (
        (Method(name="ft", scope="^(?!.*vision_tower)"), 2e-5, ()),
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
