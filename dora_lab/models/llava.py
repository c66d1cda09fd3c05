"""LLaVA-1.5: a language model that reads an image as tokens of a frozen CLIP tower (Liu et al. 2023, arXiv 2310.03744).

The model is transformers' own; what is here is how its folder is opened and what goes with it: the PIL image processor
by name (where torchvision is installed the default one resizes otherwise, to other pixels), padding to a square with
the mean colour, and the template of vicuna_v1 with the answers marked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import read_object
from dora_lab.models.open import fill, open_tokenizer, refuse_unsafe
from dora_lab.tasks.conversations import IMAGE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# conversation vicuna_v1 (LLaVA c121f04): one blank after the system's words, none after </s>; what is learnt is marked
TEMPLATE = (
    "{{ bos_token }}" + SYSTEM + "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} ASSISTANT:"
    "{% else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def is_llava(folder: Path) -> bool:
    """Whether a model's folder says that it is one; raises CheckpointError for a config.json that is none."""
    return read_object(Path(folder), "config.json").get("model_type") == "llava"


def open_llava(folder: Path, dtype: str = "float32") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model of a folder as `LlavaForConditionalGeneration.save_pretrained` writes it, and its processor.

    Raises CheckpointError as `models.open` does, and for a tower that is not CLIP's or a tokenizer whose <image> is not
    the model's.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tensors = refuse_unsafe(folder)
    config = LlavaConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "llava":
        raise CheckpointError(f"{folder}: give a LLaVA (a {config.model_type} is in it)")
    processor = make_processor(folder, config)
    model = fill(folder, LlavaForConditionalGeneration, dtype, tensors)
    return cast("LlavaForConditionalGeneration", model), processor


def make_processor(folder: Path, config: Any) -> LlavaProcessor:
    """The processor for a model of that configuration, with the tokenizer of a folder; pads on the left."""
    from transformers import LlavaProcessor

    try:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    except ImportError:
        import transformers

        raise CheckpointError(
            f"transformers {transformers.__version__} has no LlavaImageProcessorPil; install 5.20.2 or later"
        ) from None
    tower = config.vision_config
    if tower.model_type != "clip_vision_model":
        raise CheckpointError(f"{folder}: its tower is a {tower.model_type}; images are prepared for CLIP's alone")
    tokenizer: Any = open_tokenizer(folder)
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_id:
        raise CheckpointError(
            f"{folder}: {IMAGE} has id {tokenizer.convert_tokens_to_ids(IMAGE)} in the tokenizer, "
            f"{config.image_token_id} in config.json; give the tokenizer that was saved with the model"
        )
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: the tokenizer gives no character offsets; save it as tokenizer.json")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    size = tower.image_size
    images = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=tower.patch_size, num_additional_image_tokens=1, chat_template=TEMPLATE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )  # fmt: skip
