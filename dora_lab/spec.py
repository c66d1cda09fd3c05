"""What a run is: frozen values with an identity computed from their content.

A spec holds everything that can change a result and nothing that cannot (paths, device, logging, number of jobs).
`spec_id` is 12 hex digits of the SHA-256 of the canonical JSON. A field added after the first schema carries
``since(n, default)`` with a default that means "as before" and is left out of the canonical JSON while it
has that default, so the ids of old runs stay. Beside its type every field says what it means, in the words that a
protocol card uses (a phrase, or a phrase for each value), and what `validate` allows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from dora_lab.io.combinations import combinations
from dora_lab.io.limits import (
    A_DTYPE,
    ALPHAS,
    COUNT,
    CUTOFFS,
    DISTINCT,
    GROUPS,
    IN_EXPERIMENTS,
    IN_METHODS,
    INCREASING,
    KNOWN_PROTOCOLS,
    NOT_EMPTY,
    NOT_NEGATIVE,
    PASSES,
    PATTERN,
    PATTERNS,
    POSITIVE,
    PROBABILITY,
    RANKS,
    RESCALES,
    SEED,
    SHAPE,
    SHARE,
    SQUARE,
    TASK_SIZES,
)
from dora_lab.io.text import did_you_mean
from dora_lab.io.values import coerce, field_types, leaves, nested, parse, parts, plain, read


class SpecError(ValueError):
    """A spec that cannot be: says which field (dotted path), what was wrong and what to do."""


def since(schema: int, default: Any) -> Any:
    """A field that came with a later schema; its default means "as before"."""
    return field(default=default, metadata={"since": schema})


class _Checked:
    """Base of the spec classes: values are checked and brought to their field's type when constructed."""

    def __post_init__(self) -> None:
        prefix = "" if isinstance(self, Spec) else f"{type(self).__name__.lower()}."
        for name, kind in field_types(type(self)).items():
            try:
                object.__setattr__(self, name, coerce(kind, getattr(self, name), prefix + name))
            except ValueError as error:
                raise SpecError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Model(_Checked):
    """The base model that is fine-tuned."""

    # "mini" = the embedded base; else a hub id, or the id of a local folder
    name: Annotated[str, "base model", NOT_EMPTY]
    # hub commit, or the fingerprint of a local folder; None for the embedded base
    revision: Annotated[str | None, "revision of the base model"] = None
    dtype: Annotated[str, "type of the frozen weights", A_DTYPE] = "float32"  # torch dtype name
    # in Llama 3 the token of id 0 is an ordinary one. Padding is masked everywhere: neither reaches a result
    pad: Annotated[
        Literal["own", "zero"],  # own: the tokenizer's pad token, else <unk>, else its end; zero: as released
        {"own": "padding with the tokenizer's own token", "zero": "padding with the token of id 0"},
    ] = since(3, "own")
    # folder name or hub id of a saved adapter on the base
    adapter: Annotated[str | None, "adapter that is evaluated"] = since(3, None)
    # hub commit, or the folder's fingerprint
    adapter_revision: Annotated[str | None, "revision of that adapter"] = since(3, None)
    rescale: Annotated[tuple[str, ...], "layers of the base rescaled", RESCALES] = since(4, ())  # see models/rescale.py
    # what it is fed with, and how it is asked: see forms/; llava came with schema 8
    family: Annotated[Literal["decoder", "vl_bart", "llava"], {
        "decoder": "causal language model",
        "vl_bart": "BART that reads a text and frozen features of pictures",
        "llava": "LLaVA: a causal language model that reads images as tokens of a CLIP tower",
    }] = since(7, "decoder")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data(_Checked):
    """What is trained and evaluated on."""

    # "mini" = the embedded world; "commonsense_170k" = hub; "llm_adapters" = a folder in that layout; "vl_adapter" =
    # pictures: a folder, else the hub's; "value", "llava_v1_5" = folders as VALUE's release and LLaVA's data
    name: Annotated[str, "training data"]
    tasks: Annotated[tuple[str, ...], "tasks", DISTINCT]  # evaluated, by their names: "boolq", ..., "ARC-Easy", ...
    sha256: Annotated[str | None, "hash of the data folder"] = None
    revision: Annotated[str | None, "revision of the data"] = None  # hub commit
    train_items: Annotated[int | None, "training items (none: all there are)", COUNT] = None  # in all
    validation_items: Annotated[int, "items held out of training", NOT_NEGATIVE] = 0  # in all
    test_items: Annotated[int | None, "test items per task (none: all there are)", COUNT] = None
    template: Annotated[Literal["clean", "published", "cloze", "bare"], {  # published = byte for byte as released
        "clean": "clean prompt template, the same in training and evaluation",
        "published": "published prompt template, whose training and evaluation texts differ in whitespace",
        "cloze": "the question alone as prompt, the text of the right option as answer",
        "bare": "the question alone, without a word that says the task",
    }] = "clean"  # fmt: skip
    cutoff: Annotated[int, "tokens per training item at most", COUNT] = 256
    train_on_prompt: Annotated[bool, {True: "loss on prompt and answer", False: "loss on the answer alone"}] = False
    eval_name: Annotated[str | None, "evaluation data"] = None  # as `name`; None = the same
    truncation: Annotated[Literal["prompt", "right"], {  # right: as released
        "prompt": "an item that is too long loses the head of its prompt",
        "right": "an item that is too long loses its last tokens, the answer among them",
    }] = since(3, "prompt")  # fmt: skip
    eos: Annotated[Literal["always", "if_shorter"], {  # if_shorter: as released
        "always": "end-of-sequence token after every answer",
        "if_shorter": "end-of-sequence token only after items shorter than the cutoff",
    }] = since(3, "always")  # fmt: skip
    holdout: Annotated[Literal["per_task", "mixed"], {  # mixed: `train_test_split(seed=42)` of all
        "per_task": "items held out evenly from each task",
        "mixed": "items held out of all together, as released",
    }] = since(3, "per_task")  # fmt: skip
    # 8 as released
    pad_to_multiple_of: Annotated[int, "length of a training batch is a multiple of", COUNT] = since(3, 1)
    # of each task; 1: random labels
    label_noise: Annotated[float, "share of training items whose label is drawn anew", SHARE] = since(5, 0.0)
    feature_shape: Annotated[tuple[int, ...], "regions (of a clip: frames), width of one", SHAPE] = since(7, ())
    features_sha256: Annotated[str | None, "hash of the features that are read"] = since(7, None)
    # the largest of each cell of a coarser grid; None: the regions as they are
    visual_tokens: Annotated[int | None, "visual tokens per picture", SQUARE] = since(7, None)
    # "TASK=TEXT/ANSWER", narrower than `cutoff`; both are cut on the right
    cutoffs: Annotated[tuple[str, ...], "tokens of text and answer at most, by task", CUTOFFS] = since(7, ())
    loss: Annotated[Literal["token_mean", "item_mean", "scored"], {  # scored: as released
        "token_mean": "loss: mean over all answer tokens of a step",
        "item_mean": "loss: mean over the items of a step, each the mean over its tokens",
        "scored": "loss: mean over the items of a step, each the mean over its tokens times its answer's score",
    }] = since(7, "token_mean")  # fmt: skip
    padding: Annotated[Literal["read", "masked"], {  # of clips shorter than `feature_shape` says; read: as released
        "read": "zeros behind clips: read", "masked": "zeros behind clips: masked"}] = since(9, "read")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Method(_Checked):
    """How it is fine-tuned: `name` is a file in `dora_lab/methods`."""

    name: Annotated[str, "method", IN_METHODS]  # "base" (no training), "ft", "lora", "dora", ...
    rank: Annotated[int | None, "rank", COUNT] = None  # r of B (out, r) and A (r, in); None where the method has none
    alpha: Annotated[float | None, "alpha", POSITIVE] = None  # the update is (alpha / rank) B A
    dropout: Annotated[float, "dropout", PROBABILITY] = 0.0
    dropout_form: Annotated[Literal["published", "branch"], {  # what DoRA drops: see methods/dora.py
        "published": "dropout on everything but one base product (the authors' code)",
        "branch": "dropout on the low-rank branch alone",
    }] = "published"  # fmt: skip
    target_modules: Annotated[tuple[str, ...], "adapted modules"] = ()  # leaf module names, e.g. "q_proj"
    detach_norm: Annotated[  # DoRA: equation 11; False: equation 6
        bool, {True: "norm held constant in the gradient", False: "gradient through the norm"}
    ] = True
    rslora: Annotated[bool, {True: "scale alpha / sqrt(rank)", False: "scale alpha / rank"}] = since(2, False)
    # "pattern=value": of the modules whose name ends with the pattern (a regular expression, as in PEFT)
    rank_pattern: Annotated[tuple[str, ...], "ranks by pattern", RANKS] = since(2, ())
    alpha_pattern: Annotated[tuple[str, ...], "alphas by pattern", ALPHAS] = since(2, ())
    # DoRA: leaf names (table 6)
    magnitude_modules: Annotated[tuple[str, ...], "modules of which the magnitude alone is trained"] = since(2, ())
    # regular expressions that are found in full names: of a module (narrows both lists above; with ft, which has none,
    # of a parameter); of the base's parameters
    scope: Annotated[str | None, "trained only where the full name has", PATTERN] = since(6, None)
    also_train: Annotated[tuple[str, ...], "parameters that train whole, by name", PATTERNS] = since(6, ())


@dataclass(frozen=True, kw_only=True)
class Optim(_Checked):
    """The optimisation."""

    learning_rate: Annotated[float, "peak learning rate", POSITIVE]  # after warm-up
    # linear and cosine end at zero
    schedule: Annotated[Literal["linear", "cosine", "constant"], "schedule after warm-up"] = "linear"
    warmup_steps: Annotated[int, "warm-up steps", NOT_NEGATIVE]  # optimiser steps
    batch_size: Annotated[int, "items per optimiser step", COUNT]  # effective
    micro_batch_size: Annotated[int, "items per forward"]  # divides batch_size
    epochs: Annotated[float, "passes over the training items", PASSES]
    weight_decay: Annotated[float, "weight decay", NOT_NEGATIVE] = 0.0  # decoupled, AdamW's
    max_grad_norm: Annotated[float, "gradients clipped to norm", NOT_NEGATIVE] = 1.0  # Euclidean; 0 = not clipped
    keep: Annotated[Literal["last", "best_loss"], {  # best_loss needs eval_steps
        "last": "the last weights are evaluated",
        "best_loss": "the weights of the lowest validation loss are evaluated",
    }] = "last"  # fmt: skip
    eval_steps: Annotated[int | None, "steps between validation losses", COUNT] = None  # optimiser steps; None = never
    optimizer: Annotated[Literal["adamw", "sgd"], {  # decay is decoupled in both
        "adamw": "AdamW", "sgd": "SGD with momentum 0.9",
    }] = since(4, "adamw")  # fmt: skip
    # "PATTERN=FACTOR:DECAY", the pattern a regular expression that is found in the parameter's full name, e.g.
    # "lora_B=16" (LoRA+), "magnitude=1:0.01"; the first that fits counts. What is trained, the method says
    groups: Annotated[tuple[str, ...], "parameters with a rate or decay of their own", GROUPS] = since(4, ())
    # "TASK=ITEMS", of all tasks: every optimiser step is of one task, in as many micro-batches as `batch_size` gives;
    # an epoch has all steps of all tasks, in an order of its own
    task_batch_sizes: Annotated[tuple[str, ...], "items per step, each of one task", TASK_SIZES] = since(6, ())
    adam_eps: Annotated[float, "epsilon of AdamW", POSITIVE] = since(7, 1e-8)
    warmup_fraction: Annotated[float, "share of all steps that is warm-up", PROBABILITY] = since(7, 0.0)
    # bfloat16: as DeepSpeed's bf16, which keeps the weights in float32, too: in bfloat16 small steps are rounded away
    products: Annotated[Literal["own", "bfloat16"], {
        "own": "products in the type of the weights",
        "bfloat16": "products in bfloat16, weights and their steps in the model's type",
    }] = since(8, "own")  # fmt: skip

    def steps(self, items: int) -> int:
        """Optimiser steps on `items`, tasks mixed: epochs x items, in full batches (the next epoch fills the last)."""
        return max(1, math.ceil(items * self.epochs / self.batch_size))

    def warmup(self, steps: int) -> int:
        """Warm-up steps of `steps` in all."""
        return self.warmup_steps or int(self.warmup_fraction * steps)


@dataclass(frozen=True, kw_only=True)
class Probe(_Checked):
    """When magnitude and direction are recorded while training."""

    fractions: Annotated[tuple[float, ...], "recorded at fractions of all steps", INCREASING] = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Checked):
    """How answers are scored."""

    # "generate" (the paper's), "loglikelihood", "cloze" (options by their texts), "builtin" (lm-eval's own tasks)
    protocols: Annotated[tuple[str, ...], "evaluation protocols", KNOWN_PROTOCOLS] = ("generate",)
    split: Annotated[Literal["test", "validation", "train"], "items scored: split"] = "test"  # train: what was learnt
    num_beams: Annotated[int, "beams", COUNT] = 1  # of "generate"; 1 = greedy
    max_new_tokens: Annotated[int, "new tokens at most", COUNT] = 32  # of "generate"
    # items; padding can change the last bits of a logit
    batch_size: Annotated[int, "prompts per forward in evaluation", COUNT] = 32
    weights: Annotated[Literal["exact", "merged", "unmerged"], {  # merged: as released
        "exact": "adapter merged in float32, else left beside the base",
        "merged": "adapter merged into the base's type, rounded",
        "unmerged": "adapter beside the base",
    }] = since(3, "exact")  # fmt: skip
    # after merging: as released where training keeps float32
    dtype: Annotated[Literal["own", "bfloat16", "float16"], {
        "own": "weights as they were trained", "bfloat16": "merged weights in bfloat16",
        "float16": "merged weights in float16",
    }] = since(8, "own")  # fmt: skip
    task_beams: Annotated[tuple[str, ...], "beams of single tasks", TASK_SIZES] = since(7, ())  # "TASK=BEAMS"
    # "TASK=TOKENS"
    task_new_tokens: Annotated[tuple[str, ...], "new tokens of single tasks at most", TASK_SIZES] = since(8, ())
    no_repeat_ngram_size: Annotated[int, "n-grams that no answer has twice, n", NOT_NEGATIVE] = since(7, 0)  # 0: any
    early_stopping: Annotated[bool, {  # of several beams
        True: "beams end with as many answers as there are beams", False: "beams go on while a better answer may come",
    }] = since(7, False)  # fmt: skip
    # same numbers but for rounding; off: as every run before it was there
    reuse: Annotated[bool, {
        True: "a prompt is read once for all its options, a greedy answer ends with its first label",
        False: "a prompt is read anew for each of its options, an answer ends by itself",
    }] = since(8, False)  # fmt: skip
    text: Annotated[Literal["none", "pretraining"], {  # of bases whose corpus is known here
        "none": "no text besides the tasks",
        "pretraining": "held-out text of the base's pretraining scored before and after",
    }] = since(4, "none")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spec(_Checked):
    """One run, whole."""

    experiment: Annotated[str, "experiment", IN_EXPERIMENTS]  # name of a file in `experiments/`
    tier: Annotated[Literal["mini", "small", "paper"], "tier"]
    seed: Annotated[int, "seed", SEED]  # every random number of the run comes from it
    model: Model
    data: Data
    method: Method
    optim: Optim | None  # None for method "base", which is not trained
    probe: Probe | None  # None: no probe
    evaluation: Evaluation


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a `rank_pattern` names a module, as in PEFT: the pattern is the end of its name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def to_dict(spec: Spec) -> dict[str, Any]:
    """The spec as plain JSON values (tuples become lists), every field present; `from_dict` reads it back."""
    return plain(spec, omit_defaults=False)


def from_dict(values: Mapping[str, Any]) -> Spec:
    """The spec that `to_dict` wrote.

    Raises SpecError, with the dotted path and the nearest known name, for a key that is unknown, missing (only fields
    with a `since` mark may be) or of the wrong type. Ranges are `validate`'s: an old record stays readable.
    """
    try:
        return read(Spec, values)
    except ValueError as error:
        raise SpecError(str(error)) from None


@cache
def words() -> dict[str, str | dict[Any, str]]:
    """What each field means, by its dotted path: a phrase, or a phrase for each of its values."""
    return {path: notes[0] for path, (_, notes) in _fields().items() if notes}


def canonical_json(spec: Spec) -> str:
    """The text that `spec_id` hashes: sorted keys, no spaces, ASCII; a field marked `since` left out at its default."""
    return json.dumps(
        plain(spec, omit_defaults=True), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def spec_id(spec: Spec) -> str:
    """Identity of the run: the first 12 hex digits of the SHA-256 of `canonical_json`."""
    return hashlib.sha256(canonical_json(spec).encode("ascii")).hexdigest()[:12]


def derive(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """A new, validated spec with some fields changed, e.g. ``{"optim.learning_rate": "0.001", "seed": 3}``.

    Text is parsed by the field's type: numbers, ``true``/``false``, ``none`` where None is allowed, tuples as
    comma-separated text. Raises SpecError for an unknown path (with the nearest one) or a value that does not fit.
    """
    for path, value in changes.items():
        spec = _set(spec, path, value)
    validate(spec)
    return spec


def validate(spec: Spec) -> None:
    """Check ranges and combinations; raises SpecError with every field that is wrong, its value and what is allowed."""
    values = leaves(to_dict(spec))
    single = [
        (path, values[path], limit.holds(values[path]), limit.words)
        for path, (_, notes) in _fields().items()
        for limit in notes[1:]
        if values.get(path) is not None
    ]
    rules = single + combinations(spec, untrained=spec.method.name == "base")
    wrong = [f"{path} = {value!r}: must be {allowed}" for path, value, ok, allowed in rules if not ok]
    if wrong:
        raise SpecError("spec refused: " + "; ".join(wrong))


@cache
def _fields() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every dotted path of a spec: its type, and what its annotation says beside it (words, then a limit)."""
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def walk(cls: type, prefix: str) -> None:
        hints = get_type_hints(cls, include_extras=True)
        for name, kind in field_types(cls).items():
            found[prefix + name] = kind, getattr(hints[name], "__metadata__", ())
            if inner := nested(kind):
                walk(inner, f"{prefix}{name}.")

    walk(Spec, "")
    return found


def _paths() -> list[str]:
    """Every dotted path that `derive` can set."""
    return [path for path, (kind, _) in _fields().items() if not nested(kind) or type(None) in parts(kind)]


def _set(spec: Spec, path: str, value: Any) -> Spec:
    if path not in (known := _paths()):
        raise SpecError(f"unknown field '{path}'; {did_you_mean(path, known)}")
    value = parse(_fields()[path][0], value)
    outer, _, inner = path.partition(".")
    if inner:
        part = getattr(spec, outer)
        if part is None:
            raise SpecError(f"cannot set '{path}': {outer} is None in this spec (method '{spec.method.name}')")
        value = replace(part, **{inner: value})
    return replace(spec, **{outer: value})
