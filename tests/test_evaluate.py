"""Evaluation: protocols, parsing, invariance to batches, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from tiny import arc_items, boolq_items, joining_tokenizer, make_spec, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dora_lab import mini
from dora_lab.evaluation import nll
from dora_lab.evaluation.evaluate import evaluate, prepare
from dora_lab.evaluation.protocols import PROTOCOLS
from dora_lab.forms.decoder import encode
from dora_lab.forms.form import IGNORED
from dora_lab.io import limits
from dora_lab.models.base import model_and_tokenizer
from dora_lab.models.open import open_tokenizer
from dora_lab.runs.directory import RunDir
from dora_lab.runs.item_values import number_of, unpack
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, load_task, prompt

pytestmark = pytest.mark.usefixtures("one_thread")
ITEMS = {"boolq": boolq_items(9), "ARC-Easy": arc_items(6)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return model_and_tokenizer(make_spec(), save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model whose tokenizer has one token for ":" and the line end, as those of Llama-3 and DeepSeek have."""
    return model_and_tokenizer(
        make_spec(), save_model(tmp_path_factory.mktemp("joining"), tokenizer=joining_tokenizer())
    )


def go(spec: Spec, root: Path, loaded: tuple[Any, Any], items: Any = None) -> tuple[list[Any], dict[str, list[Any]]]:
    """Rows of the stream and samples by file name."""
    with RunDir.open(root, spec) as run:
        evaluate(spec, *loaded, items or ITEMS, run)
        samples = {
            file.stem: [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted(run.samples.iterdir())
        }
        return read_stream(run.path, "eval"), samples


def test_the_protocols_of_a_spec_are_those_there_are() -> None:
    assert tuple(PROTOCOLS) == limits.PROTOCOLS


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_one_by_one(beams: int, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    spec = make_spec(evaluation__num_beams=beams, evaluation__protocols="generate")
    _, samples = go(spec, tmp_path, loaded)
    model, tokenizer = loaded
    for sample, item in zip(samples["boolq.generate"], ITEMS["boolq"], strict=True):
        assert sample["prompt"] == prompt(item, "clean")
        ids = tokenizer(sample["prompt"], return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=12, do_sample=False, num_beams=beams)
        text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["output"] == text.strip()


def test_batch_size_does_not_change_anything(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    alone = go(make_spec(evaluation__batch_size=1), tmp_path, loaded)
    together = go(make_spec(evaluation__batch_size=8), tmp_path, loaded)
    for one, other in zip(alone[0], together[0], strict=True):
        told = [{k: v for k, v in row.items() if k not in (*nll.NAMES, "per_item")} for row in (one, other)]
        assert told[0] == told[1]
        for measure in nll.NAMES if one["protocol"] == "loglikelihood" else ():
            assert one[measure] == pytest.approx(other[measure], rel=1e-4)
    for name, samples in alone[1].items():
        for one, other in zip(samples, together[1][name], strict=True):
            if name.endswith("generate"):
                assert one == other
            else:
                assert one["parsed"] == other["parsed"]
                assert one["output"] == pytest.approx(other["output"], rel=1e-4)


def test_loglikelihood_is_that_of_the_model(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    _, samples = go(make_spec(evaluation__protocols="loglikelihood"), tmp_path, loaded)
    model, tokenizer = loaded
    sample = samples["ARC-Easy.loglikelihood"][1]
    assert list(sample["output"]) == ["answer1", "answer2", "answer3", "answer4"]
    start = len(tokenizer(sample["prompt"])["input_ids"])  # this tokenizer cuts at every line end
    for label, found in sample["output"].items():
        ids = torch.tensor([tokenizer(f"{sample['prompt']}the correct answer is {label}")["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        wanted = sum(float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
        assert found == pytest.approx(wanted, rel=1e-4)


def test_what_likelihoods_say_is_what_float64_logits_say(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    items = {
        task: [item | {"fact": f"fact {number // 2}"} for number, item in enumerate(pool)]
        for task, pool in ITEMS.items()
    }
    rows, samples = go(make_spec(evaluation__protocols="loglikelihood"), tmp_path, loaded, items)
    model, tokenizer = loaded
    exact = copy.deepcopy(model).double()
    for row in rows:
        found = []
        for sample in samples[f"{row['task']}.loglikelihood"]:
            assert "fact" not in sample["prompt"]
            lls = {}
            start = len(tokenizer(sample["prompt"])["input_ids"])
            for label in sample["output"]:
                ids = torch.tensor([tokenizer(f"{sample['prompt']}the correct answer is {label}")["input_ids"]])
                with torch.no_grad():
                    logs = exact(ids).logits[0].log_softmax(-1)
                lls[label] = sum(float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            right = lls.pop(sample["gold"])
            choice = -torch.tensor([right, *lls.values()], dtype=torch.float64).log_softmax(0)[0].item()
            found.append((choice, -right, right - max(lls.values())))
        for name, values in zip(nll.NAMES, np.array(found).T, strict=True):
            assert row[name] == pytest.approx(values.mean(), rel=1e-4, abs=1e-5)
            assert unpack(name, row["per_item"][name]) == pytest.approx(values, rel=1e-3, abs=1e-4)
        assert unpack("fact", row["per_item"]["fact"]).tolist() == [
            number_of(f"fact {n // 2}") for n in range(row["n"])
        ]
        assert row == {**row, **nll.columns(samples[f"{row['task']}.loglikelihood"], [None], False)}
    _, plain = go(make_spec(evaluation__protocols="loglikelihood"), tmp_path / "without", loaded)
    assert plain == samples  # a fact says what belongs together, and nothing to the model


def test_single_items_are_kept_of_tests_alone(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    chosen = make_spec(evaluation__protocols="generate,loglikelihood", evaluation__split="validation")
    generated, likely = go(chosen, tmp_path, loaded, {"boolq": ITEMS["boolq"]})[0]
    assert "per_item" not in likely and likely["choice_nll"] > 0
    assert not {*nll.NAMES, "per_item"} & generated.keys()


def test_loglikelihood_is_over_the_trained_tokens(joining: Any, tmp_path: Path) -> None:
    """Where ":" and the line end are one token: minus the loss of training on that answer, not what lm-eval cuts."""
    model, tokenizer = joining
    spec = make_spec(evaluation__protocols="loglikelihood")
    _, samples = go(spec, tmp_path, joining)
    changed = 0
    for name, items in ITEMS.items():
        for sample, item in zip(samples[f"{name}.loglikelihood"], items, strict=True):
            for label, found in sample["output"].items():
                trained = encode({name: [item | {"output": f"the correct answer is {label}"}]}, spec.data, tokenizer)
                ids, labels = trained.examples[0].ids[:-1], trained.examples[0].labels[:-1]  # without the end
                scored = [token for token in labels if token != IGNORED]
                assert tokenizer.decode(scored) == f"the correct answer is {label}"
                assert tokenizer.convert_ids_to_tokens(ids[-len(scored) - 1]) == ":\u010a"
                with torch.no_grad():
                    loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
                assert found == pytest.approx(-float(loss) * len(scored), rel=1e-4)
                plain = HFLM(model, tokenizer=tokenizer, max_length=512)._encode_pair(
                    sample["prompt"], f"the correct answer is {label}"
                )
                changed += plain[0] + plain[1] != list(ids)
    assert changed == 9 * 2 + 3 * 3 + 3 * 4


def test_the_embedded_base_reads_what_lm_eval_gives_it() -> None:
    """Its tokenizer cuts at the line end: the same tokens are read, and one more is scored by lm-eval, for all answers
    of an item alike. So no accuracy differs."""
    tokenizer: Any = open_tokenizer(mini.folder())
    lm: Any = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    (line_end,) = tokenizer.encode("\n", add_special_tokens=False)
    for task in make_spec(data__tasks="boolq,winogrande,hellaswag").data.tasks:
        for item in mini.items(task, "test")[:40]:
            for label in load_task(task).options(item):
                pair = prompt(item, "clean"), f"the correct answer is {label}"
                context, continuation = TemplateLM._encode_pair(lm, *pair)
                ours = PROTOCOLS["loglikelihood"].cut(*pair, tokenizer)
                assert ours == ([*context, line_end], continuation[1:]) and continuation[0] == line_end


def wordless() -> Any:
    """A tokenizer whose tokens may hold anything, among them the line end with the answer's first word."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["Response:\nthe correct answer is true"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="</s>", bos_token="<s>", eos_token="</s>")


def test_an_answer_that_does_not_split_is_refused(loaded: Any, joining: Any) -> None:
    spec, (model, _) = make_spec(evaluation__protocols="loglikelihood"), loaded
    with pytest.raises(ItemError, match=r"boolq, item 0: the tokenizer does not cut between the prompt and the answer"):
        prepare(spec, model, wordless(), ITEMS)
    unknowing = wordless_of_words()
    with pytest.raises(ItemError, match=r"ARC-Easy, item 0: the tokenizer makes the same tokens of two of its answers"):
        prepare(spec, model, unknowing, {"ARC-Easy": arc_items(1)})
    for good in (loaded, joining):
        assert len(prepare(spec, *good, ITEMS)) == 2


def wordless_of_words() -> Any:
    """A tokenizer of whole words, to which all labels are unknown."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "correct": 3, "answer": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="</s>", eos_token="</s>", unk_token="<unk>")


def test_rows(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    rows, samples = go(make_spec(), tmp_path, loaded)
    assert [(row["task"], row["protocol"]) for row in rows] == [
        ("boolq", "generate"),
        ("ARC-Easy", "generate"),
        ("boolq", "loglikelihood"),
        ("ARC-Easy", "loglikelihood"),
    ]
    for row in rows:
        found = samples[f"{row['task']}.{row['protocol']}"]
        assert row["n"] == len(found) == len(row["correct"])
        assert row["value"] == sum(sample["correct"] for sample in found) / row["n"]
        assert row["correct"] == "".join(str(int(sample["correct"])) for sample in found)
        unparsed = sum(sample["parsed"] is None for sample in found)
        assert row["n_unparsed"] == (unparsed if row["protocol"] == "generate" else None)
    assert rows[0]["chance"] == 0.5 and rows[0]["majority"] == 5 / 9
    assert rows[1]["chance"] == pytest.approx((3 / 3 + 3 / 4) / 6)


def test_an_unparsed_text_has_no_answer(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    rows, samples = go(make_spec(evaluation__protocols="generate"), tmp_path, loaded, {"piqa": piqa_items()})
    assert rows[0]["n_unparsed"] == 2 and rows[0]["value"] == 0.0
    assert [sample["parsed"] for sample in samples["piqa.generate"]] == [None, None]
    assert [sample["correct"] for sample in samples["piqa.generate"]] == [False, False]


def piqa_items() -> list[dict[str, Any]]:
    answer = "solution1"
    item = {"instruction": "How?", "input": "", "output": f"the correct answer is {answer}", "answer": answer}
    return [item, item]


def test_nothing_is_left_behind(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    settings = model.generation_config
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    padding = tokenizer.pad_token, tokenizer.padding_side
    go(make_spec(), tmp_path, loaded)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before
    assert (tokenizer.pad_token, tokenizer.padding_side) == padding
    model.eval()


def test_the_models_own_sampling_settings_do_not_leak_in(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = loaded
    plain = go(make_spec(), tmp_path / "plain", loaded)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 0.6, 3.0, 1
    try:
        assert go(make_spec(), tmp_path / "own", loaded) == plain
    finally:
        own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = None, None, None, None


def test_too_long_a_prompt_is_an_error(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    items = boolq_items(3)
    items[1]["instruction"] = "red " * 600 + items[1]["instruction"]
    with pytest.raises(ItemError, match=r"boolq, item 1: a prompt of \d+ tokens and 12 .* exceed .* 512 pos"):
        go(make_spec(), tmp_path, loaded, {"boolq": items})


@pytest.mark.parametrize("kind", ["bloom", "mamba", "mpt"])
def test_models_that_name_their_positions_otherwise_or_have_none(kind: str, loaded: Any, tmp_path: Path) -> None:
    tokenizer = loaded[1]
    more = {"max_seq_len": 512} if kind == "mpt" else {}
    sizes = {"bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "mamba": {"hidden_size": 32}, "mpt": {}}[kind]
    layers = {"mamba": {"num_hidden_layers": 1}, "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2}}.get(kind, {})
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=0, **sizes, **layers, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows, _ = go(make_spec(), tmp_path / "short", (model, tokenizer))
    assert [row["n"] for row in rows] == [9, 6, 9, 6]
    items = boolq_items(2)
    items[1]["instruction"] = "red " * 600 + items[1]["instruction"]
    if kind == "mpt":
        with pytest.raises(ItemError, match="exceed the model's 512 positions"):
            go(make_spec(), tmp_path / "long", (model, tokenizer), {"boolq": items})
        return
    _, samples = go(make_spec(), tmp_path / "long", (model, tokenizer), {"boolq": items})
    for sample in samples["boolq.loglikelihood"]:
        start = len(tokenizer(sample["prompt"])["input_ids"])
        for label, found in sample["output"].items():
            ids = torch.tensor([tokenizer(f"{sample['prompt']}the correct answer is {label}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            wanted = sum(float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            assert found == pytest.approx(wanted, rel=1e-4)
