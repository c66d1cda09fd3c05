"""What no field of a spec can say alone: which of them go together."""

from __future__ import annotations

from typing import Any

from dora_lab.io.limits import REGIONS, TASK_SIZES, task_sizes
from dora_lab.io.values import leaves, plain

CLIPS = ("value", "mini_clips", "mini_clips_blind")  # sources whose items show frames (`tasks.value.NAMES`)
# fields that models of these families alone read, beside those that all do
READ_BY = {
    "decoder": (
        "data.truncation", "data.eos", "data.holdout", "data.pad_to_multiple_of", "data.label_noise", "evaluation.text",
    ),
    "vl_bart": (
        "data.feature_shape", "data.features_sha256", "data.visual_tokens", "data.cutoffs", "data.loss", "data.padding",
        "evaluation.task_beams", "evaluation.no_repeat_ngram_size", "evaluation.early_stopping",
    ),
    "llava": ("data.truncation", "evaluation.task_new_tokens"),
}  # fmt: skip
TEMPLATES = {
    "decoder": ("clean", "published", "cloze"), "vl_bart": ("clean", "published", "bare"), "llava": ("published",),
}  # fmt: skip
Rule = tuple[str, object, object, str]


def combinations(spec: Any, *, untrained: bool) -> list[Rule]:
    """What no field can say alone: (dotted path, value, whether it is right, what is allowed)."""
    method, optim, adapter, split = spec.method, spec.optim, spec.model.adapter, spec.evaluation.split
    own = {*spec.evaluation.protocols} - {"builtin"}
    fits = own <= {"cloze"} if spec.data.template == "cloze" else "cloze" not in own
    asks_own = split == "test" or "builtin" not in spec.evaluation.protocols
    evaluated = spec.evaluation.dtype == "own" or (
        spec.model.dtype == "float32" and spec.evaluation.weights != "unmerged"
    )
    rules: list[Rule] = [
        *_of_family(spec),
        ("evaluation.dtype", spec.evaluation.dtype, evaluated, "own, but for merged weights of a float32 model"),
        ("model.adapter", adapter, not adapter or untrained, "None for training"),
        ("method.alpha", method.alpha, (method.alpha is None) == (method.rank is None), "given exactly with a rank"),
        ("evaluation.protocols", spec.evaluation.protocols, fits, "cloze (or builtin) just with data.template cloze"),
        ("evaluation.split", split, asks_own, "test with protocol builtin, whose items are lm-eval's"),
        ("optim", optim, (optim is None) == untrained, "None for method base, given for every other"),
        ("probe", spec.probe, not (untrained and spec.probe), "None for method base"),
    ]
    if optim is not None:
        micro = optim.micro_batch_size
        divides = micro >= 1 and optim.batch_size % micro == 0
        keeps = optim.keep == "last" or (optim.eval_steps is not None and spec.data.validation_items > 0)
        sizes = task_sizes(optim.task_batch_sizes) if TASK_SIZES.holds(optim.task_batch_sizes) else {}
        odd = [task for task, size in sizes.items() if divides and size % (optim.batch_size // micro)]
        rules += [
            ("optim.task_batch_sizes", odd, not odd, "so many items that micro-batches are as many as in batch_size"),
            ("optim.micro_batch_size", micro, divides, f"a divisor of optim.batch_size = {optim.batch_size}"),
            (
                "optim.warmup_steps",
                optim.warmup_steps,
                not optim.warmup_fraction or not optim.warmup_steps,
                "0 with optim.warmup_fraction",
            ),
            ("optim.keep", optim.keep, keeps, "last, unless optim.eval_steps and data.validation_items are given"),
        ]
    return rules


def unread_by(family: str) -> set[str]:
    """The fields that models of a family do not read."""
    return {path for paths in READ_BY.values() for path in paths} - {*READ_BY[family]}


def _of_family(spec: Any) -> list[Rule]:
    """A setting that changes nothing must not look as if it did."""
    family, data, evaluation = spec.model.family, spec.data, spec.evaluation
    unread, changed = unread_by(family), leaves(plain(spec, omit_defaults=True))
    every = dict.fromkeys(path for paths in READ_BY.values() for path in paths)
    idle = [path for path in every if path in unread and path in changed]
    rules: list[Rule] = [
        (
            "model.family",
            family,
            not idle,
            f"one that reads {', '.join(idle)} (else leave it at its default)",
        ),
        ("data.template", data.template, data.template in TEMPLATES[family], f"one of {', '.join(TEMPLATES[family])}"),
    ]
    if family == "decoder":
        return rules
    rules += [
        ("data.train_on_prompt", data.train_on_prompt, not data.train_on_prompt, f"false with {family}"),
        (
            "evaluation.protocols",
            evaluation.protocols,
            evaluation.protocols == ("generate",),
            f"generate alone with model.family {family}",
        ),
    ]
    if family == "vl_bart":
        return rules + _of_pictures(spec)
    return [
        *rules,
        ("data.truncation", data.truncation, data.truncation == "right", "right with llava, as released"),
        ("evaluation.num_beams", evaluation.num_beams, evaluation.num_beams == 1, "1 with llava, as released"),
        (
            "evaluation.split",
            evaluation.split,
            evaluation.split == "test" or (evaluation.split == "validation" and data.name != "llava_v1_5"),
            "test with llava, whose benchmarks have no other items (of data written here validation, too)",
        ),
        ("model.rescale", spec.model.rescale, not spec.model.rescale, "empty with llava"),
        ("model.pad", spec.model.pad, spec.model.pad == "own", "own with llava"),
    ]


def _of_pictures(spec: Any) -> list[Rule]:
    """Those of VL-BART alone."""
    data, clips = spec.data, spec.data.name in CLIPS
    shape, tokens = data.feature_shape, data.visual_tokens
    one_task = len(data.tasks) == 1 or spec.optim is None or spec.optim.task_batch_sizes
    words = f"at most {REGIONS} regions or frames (as data.visual_tokens says), which is how many words tell them apart"
    return [
        ("data.feature_shape", shape, shape, "given with model.family vl_bart"),
        ("data.feature_shape", shape, (tokens or next(iter(shape), 0)) <= REGIONS, words),
        (
            "data.visual_tokens",
            tokens,
            tokens is None or not clips,
            "none with data.name value or mini_clips: a clip has no grid, data.feature_shape begins with its frames",
        ),
        (
            "data.padding",
            data.padding,
            clips or data.padding == "read",
            "read but with data.name value or mini_clips (no picture is padded)",
        ),
        ("optim.task_batch_sizes", (), one_task, "given for several tasks, which have other numbers of pictures"),
    ]
