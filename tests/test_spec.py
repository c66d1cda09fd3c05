"""Specs: stable identities, strict reading, the command line's changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from dora_lab import spec as specs
from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Probe, Spec, SpecError

DORA = Spec(
    experiment="commonsense",
    tier="mini",
    seed=0,
    model=Model(name="mini"),
    data=Data(name="mini", tasks=("boolq", "ARC-Easy")),
    method=Method(name="dora", rank=8, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj")),
    optim=Optim(learning_rate=1e-3, warmup_steps=10, batch_size=32, micro_batch_size=16, epochs=3),
    probe=Probe(),
    evaluation=Evaluation(),
)
BASE = replace(DORA, method=Method(name="base"), optim=None, probe=None)

# An id that changes orphans every committed run: new fields need a `since` mark, not a new golden value here.
GOLDEN = {
    "3a56b944938e": DORA,
    "36eed39b329e": BASE,
    "06834d147c27": replace(DORA, seed=1),
    "ecd0207b9755": replace(DORA, tier="paper", model=Model(name="org/model", revision="abc", dtype="bfloat16")),
}


@pytest.mark.parametrize(("identity", "spec"), GOLDEN.items())
def test_ids_are_stable(identity: str, spec: Spec) -> None:
    assert specs.spec_id(spec) == identity


def test_round_trip_through_json() -> None:
    for spec in GOLDEN.values():
        assert specs.from_dict(json.loads(json.dumps(specs.to_dict(spec)))) == spec


def test_equal_values_have_one_id() -> None:
    whole = replace(DORA, method=replace(DORA.method, alpha=16.0, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    assert specs.spec_id(whole) == specs.spec_id(DORA)


def test_every_field_has_its_part_in_the_id() -> None:
    other: dict[str, Any] = {
        "experiment": "x", "tier": "paper", "data.template": "published", "data.train_on_prompt": True,
        "method.name": "lora", "method.dropout_form": "branch", "method.detach_norm": False,
        "method.target_modules": "k_proj", "optim.schedule": "cosine", "optim.keep": "best_loss", "optim": "none",
        "optim.micro_batch_size": "8", "probe": "none", "probe.fractions": "0.5,1.0", "data.tasks": "piqa",
        "evaluation.protocols": "loglikelihood", "evaluation.split": "validation", "data.sha256": "a",
        "data.revision": "a", "data.eval_name": "a", "model.revision": "a", "model.name": "a", "data.name": "a",
        "model.dtype": "bfloat16", "method.dropout": "0.5", "method.rslora": True,
        "model.pad": "zero", "model.adapter": "a", "model.adapter_revision": "a", "data.truncation": "right",
        "data.eos": "if_shorter", "data.holdout": "mixed", "evaluation.weights": "merged",
        "evaluation.text": "pretraining", "optim.optimizer": "sgd", "optim.groups": "lora_B=16",
        "method.scope": "layers", "method.also_train": "bias",
        "optim.task_batch_sizes": "boolq=32", "model.family": "vl_bart", "data.cutoffs": "boolq=20/10",
        "data.loss": "scored", "evaluation.task_beams": "boolq=5", "evaluation.early_stopping": True,
        "evaluation.reuse": True, "data.padding": "masked",
        "optim.products": "bfloat16", "evaluation.dtype": "float16", "evaluation.task_new_tokens": "boolq=7",
    }  # fmt: skip
    seen = {specs.spec_id(DORA)}
    for path in specs._paths():
        changed = specs.spec_id(specs._set(DORA, path, other.get(path, "7")))
        assert changed not in seen, path
        seen.add(changed)


def edited(path: str, value: Any = None, *, remove: bool = False) -> dict[str, Any]:
    values = specs.to_dict(DORA)
    *parents, leaf = path.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    if remove:
        del node[leaf]
    else:
        node[leaf] = value
    return values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (edited("optim.lerning_rate", 1.0), "unknown field 'optim.lerning_rate'; did you mean 'learning_rate'?"),
        (edited("sede", 1), "unknown field 'sede'; did you mean 'seed'?"),
        (edited("optim.weight_decay", remove=True), "missing field 'optim.weight_decay'"),
        (edited("seed", remove=True), "missing field 'seed'"),
        (edited("method.rank", "8"), "method.rank = '8': expected a whole number or None"),
        (edited("method.rank", 8.0), "method.rank = 8.0: expected a whole number or None"),
        (edited("seed", True), "seed = True: expected a whole number"),
        (edited("method.detach_norm", 1), "method.detach_norm = 1: expected true or false"),
        (edited("optim.epochs", float("nan")), "optim.epochs = nan: expected a finite number"),
        (edited("data.tasks", "boolq"), "data.tasks = 'boolq': expected a list of text"),
        (edited("data.tasks", ["boolq", 1]), "data.tasks[1] = 1: expected text"),
        (edited("data.template", "cleen"), "data.template = 'cleen': expected one of 'clean', 'published'"),
        (edited("model", "mini"), "model: expected a JSON object, got 'mini'"),
        (edited("model", None), "model = None: expected Model"),
    ],
)
def test_reading_refuses(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        specs.from_dict(values)
    assert words in str(caught.value)


def test_a_later_field_keeps_old_ids_and_old_records(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Evaluation):
        temperature: float = field(default=0.0, metadata={"since": 2})

    old = specs.to_dict(DORA)
    later = replace(DORA, evaluation=Later())
    assert specs.spec_id(later) == specs.spec_id(DORA)
    assert specs.to_dict(later)["evaluation"]["temperature"] == 0.0
    assert specs.spec_id(replace(DORA, evaluation=Later(temperature=0.5))) != specs.spec_id(DORA)
    assert specs.read(Later, old["evaluation"], "evaluation.") == Later()


def test_derive_parses_by_the_fields_type() -> None:
    changes = {"optim.learning_rate": "2e-3", "seed": "3", "method.rank": 4, "data.tasks": "boolq, piqa"}
    changes |= {"method.detach_norm": "false", "data.test_items": "none", "probe": "none"}
    spec = specs.derive(DORA, changes)
    assert spec.optim and spec.optim.learning_rate == 2e-3
    assert (spec.seed, spec.method.rank, spec.data.tasks, spec.method.detach_norm) == (3, 4, ("boolq", "piqa"), False)
    assert spec.data.test_items is None and spec.probe is None
    assert DORA.seed == 0


@pytest.mark.parametrize(
    ("spec", "path", "value", "words"),
    [
        (DORA, "optim.learning_rat", "1", "did you mean 'optim.learning_rate'?"),
        (DORA, "learning_rate", "1", "unknown field 'learning_rate'"),
        (DORA, "model", "mini", "unknown field 'model'"),
        (DORA, "seed", "three", "seed = 'three': expected a whole number"),
        (DORA, "method.detach_norm", "maybe", "expected true or false"),
        (BASE, "optim.learning_rate", "1", "optim is None in this spec (method 'base')"),
        (DORA, "probe", "0.5", "probe = '0.5': expected Probe or None"),
        (DORA, "method.dropout", "1", "method.dropout = 1.0: must be in [0, 1)"),
        (DORA, "optim.epochs", "1e308", "optim.epochs = 1e+308: must be greater than 0, at most a million"),
        (DORA, "optim", "none", "optim = None: must be None for method base, given for every other"),
        (DORA, "optim.micro_batch_size", "5", "a divisor of optim.batch_size = 32"),
        (DORA, "probe.fractions", "0.5,0.25", "increasing numbers in (0, 1]"),
        (DORA, "evaluation.protocols", "generat", "distinct ones of generate, loglikelihood"),
        (DORA, "optim.keep", "best_loss", "unless optim.eval_steps"),
        (DORA, "model.adapter", "org/adapter", "model.adapter = 'org/adapter': must be None for training"),
        (DORA, "data.pad_to_multiple_of", "0", "at least 1"),
        (DORA, "optim.task_batch_sizes", "boolq=0", "TASK=ITEMS each, ITEMS at least 1, a task once"),
        (DORA, "optim.task_batch_sizes", "boolq=4, boolq=8", "TASK=ITEMS each"),
        (
            DORA,
            "optim.task_batch_sizes",
            "boolq=5",
            "optim.task_batch_sizes = ['boolq']: must be so many items that micro-",
        ),
    ],
)
def test_derive_refuses(spec: Spec, path: str, value: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        specs.derive(spec, {path: value})
    assert words in str(caught.value)


def test_validate_names_every_wrong_field() -> None:
    wrong = replace(DORA, seed=-1, method=replace(DORA.method, rank=0))
    with pytest.raises(SpecError, match=r"seed = -1.*method\.rank = 0"):
        specs.validate(wrong)
    for spec in GOLDEN.values():
        specs.validate(spec)


def test_the_package_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, dora_lab.runs.directory; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PICTURED = replace(
    DORA,
    model=Model(name="facebook/bart-base", family="vl_bart"),
    data=Data(name="vl_adapter", tasks=("vqa", "nlvr2"), feature_shape=(49, 2048), visual_tokens=36, loss="scored"),
    optim=replace(DORA.optim, task_batch_sizes=("vqa=4", "nlvr2=2")),  # type: ignore[type-var]
)


def test_what_a_family_of_models_does_not_read_stays_at_its_default() -> None:
    specs.validate(PICTURED)
    for changes, words in (
        ({"model.family": "decoder"}, "one that reads data.feature_shape, data.visual_tokens, data.loss (else leave"),
        ({"data.eos": "if_shorter"}, "model.family = 'vl_bart': must be one that reads data.eos"),
        ({"data.template": "cloze"}, "data.template = 'cloze': must be one of clean, published, bare"),
        ({"data.feature_shape": ()}, "data.feature_shape = (): must be given with model.family vl_bart"),
        ({"data.feature_shape": "49"}, "data.feature_shape = [49]: must be empty, or regions and width"),
        (
            {"data.padding": "masked"},
            "data.padding = 'masked': must be read but with data.name value or mini_clips (no",
        ),
        ({"data.name": "value"}, "data.visual_tokens = 36: must be none with data.name value or mini_clips: a clip"),
        ({"data.visual_tokens": 121}, "data.feature_shape = (49, 2048): must be at most 100 regions or frames"),
        (
            {"data.visual_tokens": "none", "data.feature_shape": "101,8"},
            "must be at most 100 regions or frames",
        ),
        ({"data.visual_tokens": 35}, "data.visual_tokens = 35: must be a square number"),
        ({"data.cutoffs": "vqa=20"}, "data.cutoffs = ['vqa=20']: must be TASK=TEXT/ANSWER each"),
        ({"data.train_on_prompt": True}, "data.train_on_prompt = True: must be false with vl_bart"),
        ({"evaluation.protocols": "loglikelihood"}, "generate alone with model.family vl_bart"),
        ({"optim.task_batch_sizes": ""}, "given for several tasks"),
        ({"optim.warmup_fraction": 0.1}, "optim.warmup_steps = 10: must be 0 with optim.warmup_fraction"),
    ):
        with pytest.raises(SpecError) as caught:
            specs.derive(PICTURED, changes)
        assert words in str(caught.value)
    specs.validate(specs.derive(PICTURED, {"data.feature_shape": "196,8"}))  # 36 of them are left
    specs.validate(specs.derive(PICTURED, {"data.feature_shape": "100,8", "data.visual_tokens": "none"}))
    with pytest.raises(SpecError, match=r"data\.template = 'bare': must be one of clean, published, cloze"):
        specs.derive(DORA, {"data.template": "bare"})
