"""`evaluation.reuse`: a prompt read once for all its options, a greedy answer that ends with its first label."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from tiny import make_spec, save_data, save_model

from dora_lab.evaluation.evaluate import evaluate
from dora_lab.evaluation.lm_eval_model import Model
from dora_lab.evaluation.shared import keeps_prompts, likelihoods
from dora_lab.models.base import model_and_tokenizer
from dora_lab.runs.directory import RunDir
from dora_lab.runs.streams import read_stream
from dora_lab.spec import spec_id
from dora_lab.tasks import all_tasks, load_task
from dora_lab.tasks.sources import items as read

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(name: str, folder: Path) -> tuple[Any, Any]:
    save = save_model if name == "llama" else lambda where: save_family(name, where)
    model, tokenizer = model_and_tokenizer(make_spec(), save(folder / name))
    return model.eval(), tokenizer


def pairs_of(seed: int, prompts: int = 12) -> list[tuple[list[int], list[int]]]:
    """Prompts of 2 to 39 tokens with two to four continuations of 1 to 6, the pairs in no order."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(draw.randrange(low, high))]

    found = [
        (prompt, ids(1, 7)) for prompt in (ids(2, 40) for _ in range(prompts)) for _ in range(draw.randrange(2, 5))
    ]
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "bloom"])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_prompt_that_is_read_once_gives_the_logits_of_whole_texts(name: str, batch: int, tmp_path: Path) -> None:
    model, tokenizer = opened(name, tmp_path)
    pairs = pairs_of(batch)
    # one at a time, without padding, without a cache, in float64
    wide = model.double()
    expected = []
    with torch.no_grad():
        for prompt, text in pairs:
            log_TV = wide(input_ids=torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            ids_T = torch.tensor(text)
            expected.append((log_TV.gather(1, ids_T[:, None]).sum().item(), bool((log_TV.argmax(-1) == ids_T).all())))
    found = likelihoods(model.float(), pairs, batch, tokenizer.pad_token_id, lambda: None)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    greedy = [(prompt, [int(wide(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())]) for prompt, _ in pairs[:3]]
    assert all(one for _, one in likelihoods(model, greedy, batch, tokenizer.pad_token_id, lambda: None))


def test_fewer_tokens_are_read(tmp_path: Path) -> None:
    model, tokenizer = opened("llama", tmp_path)
    pairs = [([5] * 40, [number, number + 1]) for number in range(10, 14)]
    seen = {False: 0, True: 0}
    for reuse in seen:
        count = model.register_forward_pre_hook(
            lambda module, args, kwargs, reuse=reuse: seen.__setitem__(
                reuse, seen[reuse] + (args[0] if args else kwargs["input_ids"]).numel()
            ),
            with_kwargs=True,
        )
        requests = [(("", ""), *pair) for pair in pairs]
        Model(model, tokenizer, 4, lambda: None, reuse=reuse)._loglikelihood_tokens(requests, disable_tqdm=True)
        count.remove()
    assert seen == {False: 4 * 41, True: 40 + 4}


def test_what_keeps_no_prompt_reads_whole_texts(tmp_path: Path) -> None:
    model, tokenizer = opened("mamba", tmp_path)
    assert not keeps_prompts(model)
    requests = [(("", ""), [5, 6, 7], [8]), (("", ""), [5, 6, 7], [9, 10])]
    both = [Model(model, tokenizer, 2, lambda: None, reuse=reuse) for reuse in (False, True)]
    assert both[0]._loglikelihood_tokens(requests) == both[1]._loglikelihood_tokens(requests)


@pytest.mark.parametrize("protocol", ["cloze", "loglikelihood", "generate"])
def test_the_same_answers(protocol: str, tmp_path: Path) -> None:
    template = "cloze" if protocol == "cloze" else "clean"
    folder, data = save_model(tmp_path / "model"), save_data(tmp_path / "data", test=9)
    rows: dict[bool, list[dict[str, Any]]] = {}
    outputs: dict[bool, list[dict[str, Any]]] = {}
    for reuse in (False, True):
        spec = make_spec(data__template=template, evaluation__protocols=protocol, evaluation__batch_size=4,
                         evaluation__reuse=reuse)  # fmt: skip
        model, tokenizer = model_and_tokenizer(spec, folder)
        with RunDir.open(tmp_path / str(reuse), spec) as run:
            evaluate(spec, model, tokenizer, read(spec, data).test, run)
            rows[reuse] = read_stream(run.path, "eval")
            lines = "".join(file.read_text() for file in sorted(run.samples.glob("*.jsonl"))).splitlines()
            outputs[reuse] = [json.loads(line) for line in lines]
    assert [row["correct"] for row in rows[True]] == [row["correct"] for row in rows[False]]
    assert [one["parsed"] for one in outputs[True]] == [one["parsed"] for one in outputs[False]]
    if protocol != "generate":
        for one, other in zip(outputs[True], outputs[False], strict=True):
            assert one["output"] == pytest.approx(other["output"], abs=1e-4)


def test_a_greedy_answer_ends_with_its_first_label(tmp_path: Path) -> None:
    model, tokenizer = opened("llama", tmp_path)
    prompts = [tokenizer(text)["input_ids"] for text in ("Question: is it red?", "Question: blue")]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(one)) + one for one in prompts])
    whole = Model(model, tokenizer, 2, lambda: None)._model_generate(ids, width + 16, [], do_sample=False, num_beams=1)
    told = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in whole]
    label = told[0][2:5]  # of the first text, some way in: the second may not have it at all

    def first(text: str) -> str | None:
        return label if label in text else None

    short = Model(model, tokenizer, 2, lambda: None, reuse=True, label=first)
    cut = short._model_generate(ids, width + 16, [], do_sample=False, num_beams=1)
    texts = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in cut]
    assert label in texts[0] and len(texts[0]) < len(told[0]) and told[0].startswith(texts[0])
    assert told[1].startswith(texts[1]) and (label in texts[1] or texts[1] == told[1])


def test_a_label_that_was_said_is_no_beginning_of_another() -> None:
    boolq = load_task("boolq")
    assert boolq.first_label("it is tru") is None and boolq.first_label("it is true") == "true"
    assert boolq.first_label("true, not false") == boolq.parse("true, not false") == "true"
    assert replace(boolq, labels=()).first_label("anything") is None
    for task in all_tasks():
        assert not any(one != other and other.startswith(one) for one in task.labels for other in task.labels)


def test_ids_stay_where_nothing_is_reused() -> None:
    assert spec_id(make_spec()) == spec_id(make_spec(evaluation__reuse=False))
    assert spec_id(make_spec(evaluation__reuse=True)) != spec_id(make_spec())
