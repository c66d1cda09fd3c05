"""The parts of a LLaVA joined: the joined model computes what transformers' own parts compute, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from tiny_llava import SIZE, llama_tokenizer, save_image
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.forms.llava import Llava
from dora_lab.io.errors import CheckpointError
from dora_lab.launch.join_llava import join
from dora_lab.models.llava import open_llava

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer knows no <image>, a whole CLIP, and a projector as LLaVA released it (pickled)."""
    where = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = llama_tokenizer(image=False)
    words = T.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    T.LlamaForCausalLM(words).half().save_pretrained(where / "words")
    tokenizer.save_pretrained(where / "words")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    clip = T.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": SIZE, "patch_size": 7})
    T.CLIPModel(clip).save_pretrained(where / "tower")
    torch.save(projector(), where / "mm_projector.bin")
    return where


def projector() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {f"model.mm_projector.{name}": tensor for name, tensor in drawn.items()}


def joined(parts: Path, out: Path) -> tuple[Any, Any]:
    join(parts / "words", parts / "tower", parts / "mm_projector.bin", out, allow_pickle=True)
    return open_llava(out)


def test_it_computes_what_its_parts_do(parts: Path, tmp_path: Path) -> None:
    model, processor = joined(parts, tmp_path / "out")
    form = Llava(processor)  # its template, <image> and mask fit together
    save_image(tmp_path / "red.png", "red")
    item = {"text": "<image>\nWhat colour is it?", "image": tmp_path / "red.png", "where": ""}
    inputs = form.collate([form.question(item)])
    with torch.no_grad():
        found = model.eval()(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        tower = T.CLIPVisionModel.from_pretrained(parts / "tower").eval()
        seen = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        W = {name.removeprefix("model.mm_projector."): tensor for name, tensor in projector().items()}
        seen = torch.nn.functional.gelu(seen @ W["0.weight"].T + W["0.bias"]) @ W["2.weight"].T + W["2.bias"]
        words: Any = T.LlamaForCausalLM.from_pretrained(parts / "words", dtype=torch.float32).eval()
        ids, rows = inputs["input_ids"], words.config.vocab_size
        marks = ids == rows
        assert int(marks.sum()) == 16 and ids.max() == rows  # the token after the last
        embedded = words.model.embed_tokens(ids.masked_fill(marks, 0))
        embedded[marks] = seen.flatten(0, 1)
        wanted = words(inputs_embeds=embedded).logits
    torch.testing.assert_close(found[..., :rows], wanted, rtol=1e-4, atol=1e-4)
    assert found.argmax(-1).max() < rows  # <image> is never said,
    assert found.softmax(-1)[..., rows].max() < 1 / rows  # and takes no more of all probability than this


def test_no_number_changes_nor_its_type(parts: Path, tmp_path: Path) -> None:
    joined(parts, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    held = [*load_file(parts / "words" / "model.safetensors").values(), *projector().values()]
    held += [
        W for name, W in load_file(parts / "tower" / "model.safetensors").items() if name.startswith("vision_model.")
    ]
    assert len(after) == len(held)
    for tensor in held:
        rows = len(tensor)
        assert any(
            one.dtype == tensor.dtype and one.shape[1:] == tensor.shape[1:] and torch.equal(one[:rows], tensor)
            for one in after.values()
        )
    config = T.LlavaConfig.from_pretrained(tmp_path / "out")
    assert config.image_token_id == config.text_config.vocab_size - 1
    before = T.AutoConfig.from_pretrained(parts / "words").to_dict()
    same = ("hidden_size", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads")
    assert all(getattr(config.text_config, name) == before[name] for name in same)


def test_the_command_and_what_it_refuses(parts: Path, tmp_path: Path) -> None:
    named = [parts / "words", parts / "tower", parts / "mm_projector.bin"]
    words = ["join-llava", *map(str, named), str(tmp_path / "out")]
    done = CliRunner().invoke(command.app, words)
    assert isinstance(done.exception, CheckpointError) and "a pickle can run code" in str(done.exception)
    done = CliRunner().invoke(command.app, [*words, "--allow-pickle"])
    assert done.exit_code == 0 and str(tmp_path / "out") in done.output
    with pytest.raises(CheckpointError, match="is there and not empty"):
        join(*named, tmp_path / "out", allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"give a llama \(a clip is in it\)"):
        join(named[1], *named[1:], tmp_path / "other", allow_pickle=True)
    with pytest.raises(CheckpointError, match="no configuration that can be read"):
        join(named[0], tmp_path, named[2], tmp_path / "other", allow_pickle=True)
    for change, message in (
        (
            {"0.weight": torch.ones(32, 15)},
            r"'model\.multi_modal_projector\.linear_1\.weight' has the shape \(32, 15\)",
        ),
        ({"2.bias": torch.full((32,), torch.nan)}, "not finite"),
    ):
        torch.save(projector() | {f"model.mm_projector.{name}": W for name, W in change.items()}, tmp_path / "p.bin")
        with pytest.raises(CheckpointError, match=message):
            join(*named[:2], tmp_path / "p.bin", tmp_path / "other", allow_pickle=True)
