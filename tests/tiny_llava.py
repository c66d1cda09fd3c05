"""A tiny random LLaVA with a tokenizer of Llama's layout, images and conversations in the layout of its mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,
detailed, and polite answers to the user's questions. USER: ASSISTANT: What colour is it? red green blue yes no
Yes, one. A probe? And text? No: 2 Answer the question using a single word or phrase. Is it"""
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}
SIZE, PATCH = 28, 7  # pixels of an image's side and a patch's: 16 tokens


def llama_tokenizer(image: bool = True) -> Any:
    """As Llama 1 and 2 have it: blanks are part of the word behind them, bytes for what is unknown, <s> in front."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore
    core.pre_tokenizer = Split(Regex("▁"), "merged_with_next")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator([WORDS] * 20, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore
    if image:
        core.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_llava(folder: Path, seed: int = 0, hidden: int = 32) -> Path:
    """A random LLaVA, saved as a hub model would be: a CLIP tower of 3 layers, a Llama of 2."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = llama_tokenizer()
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    words = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=tower, text_config=words, image_token_id=image, image_seq_length=16)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_image(file: Path, colour: str, size: tuple[int, int] = (40, 24)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(file)
    return file


def save_mix(folder: Path, count: int = 12) -> Path:
    """`count` conversations, of every three the last without an image; returns the file."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        colour = [*COLOURS][number % 2]
        if number % 3 == 2:
            said = [("human", "Is it red?"), ("gpt", "no" if number % 2 else "yes")]
            rows.append({"id": f"t{number}"})
        else:
            name = f"coco/train2017/{number:012}.png"
            save_image(folder / name, colour, (40, 24) if number % 2 else (20, 36))
            said = [("human", "What colour is it?\n<image>"), ("gpt", colour), ("human", "Is it red?")]
            said.append(("gpt", "yes" if colour == "red" else "no"))
            rows.append({"id": f"{number:012}", "image": name})
        rows[-1]["conversations"] = [{"from": who, "value": text} for who, text in said]
    file = folder / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def save_as_the_authors(peft: Path, folder: Path) -> None:
    """A DoRA in PEFT's form by LLaVA's names, magnitudes as (out, 1), the projector in a file of its own."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    held = load_file(peft / "adapter_model.safetensors")
    leaves = json.loads((peft / "adapter_config.json").read_text())["target_modules"]
    adapter, beside = {}, {}
    for key, tensor in held.items():
        if "multi_modal_projector" in key:
            place = key.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
            beside[place.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
        elif key.endswith("lora_magnitude_vector"):
            name = key.replace("lora_magnitude_vector", "weight_m_wdecomp.weight")
            adapter[name.replace(".language_model.", ".")] = tensor[:, None]
        else:
            adapter[key.replace(".language_model.", ".")] = tensor
    assert set(beside) == {
        f"base_model.model.model.mm_projector.{n}.{leaf}" for n in (0, 2) for leaf in ("weight", "bias")
    }
    assert "base_model.model.model.layers.0.self_attn.q_proj.weight_m_wdecomp.weight" in adapter
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(beside, folder / "non_lora_trainables.bin")
    config = {"peft_type": "DORA", "r": 4, "lora_alpha": 8, "target_modules": leaves, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
