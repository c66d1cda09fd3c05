"""VL-BART: BART whose encoder reads a text and frozen features of pictures (Cho et al. 2021, arXiv 2102.02779).

As the paper fine-tunes it (VL-Adapter, Sung et al. 2022, arXiv 2112.06825): the tokens of the pictures follow those of
the text, have no position and do not pass the text's layer norm; what tells them apart is the order of the pictures
and, within one, the last rows of the word embeddings, counted backwards (200 tokens are added). Boxes are all zero.

Shape suffixes: B items, T tokens of text, P pictures of an item (1 or 2), R regions of a picture (a clip: its frames),
F numbers of a feature, W words, D width of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder

from dora_lab.io.errors import CheckpointError
from dora_lab.io.limits import REGIONS
from dora_lab.models.open import fill, open_tokenizer, refuse_unsafe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PICTURES, COORDINATES = 2, 5  # of an item at most; four sides of a box and its area
# as released: 100 of each, added in falling order, so that the last row of the embeddings is that of <vis_extra_id_0>
TOKENS = [f"<{kind}_{number}>" for kind in ("extra_id", "vis_extra_id") for number in reversed(range(REGIONS))]


class VisualEmbedding(nn.Module):
    """LN(W f) + LN(W' box) + e(picture) + word(region): the tokens of an item's pictures."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        self.box = nn.Sequential(nn.Linear(COORDINATES, dim), nn.LayerNorm(dim))
        self.picture = nn.Embedding(PICTURES, dim)

    def forward(self, features_BPRF: Tensor, words_WD: Tensor) -> Tensor:
        """(B, P x R, D); region k of a picture has the word at k from the end."""
        _, pictures, regions, _ = features_BPRF.shape
        box_D = self.box(features_BPRF.new_zeros(COORDINATES))
        order_PRD = self.picture.weight[:pictures, None] + words_WD[-regions:].flip(0)
        return (self.feature(features_BPRF) + box_D + order_PRD).flatten(1, 2)


class JointEncoder(BartEncoder):
    """BART's encoder over text and pictures."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        sizes: Any = config
        self.visual_embedding = VisualEmbedding(sizes.feature_size, sizes.d_model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """What the last layer gives; nothing else is recorded, whatever else is asked for.

        Args: input_ids (B, T), padded on the right; attention_mask (B, T + P x R); features (B, P, R, F).

        Raises ValueError for features that are missing or of another shape, and for a mask that is the text's alone.
        """
        size = self.visual_embedding.feature[0].in_features
        if input_ids is None or features is None or features.dim() != 4 or features.shape[-1] != size:
            shape = None if features is None else tuple(features.shape)
            raise ValueError(f"features are {shape}: expected (items, pictures, regions, {size}), and input_ids beside")
        if not 1 <= features.shape[1] <= PICTURES:
            raise ValueError(f"features are of {features.shape[1]} pictures an item: 1 or {PICTURES}")
        text_BTD = self.layernorm_embedding(self.embed_tokens(input_ids) + self.embed_positions(input_ids))
        seen_BSD = self.visual_embedding(features.to(text_BTD.dtype), self.embed_tokens.weight)
        hidden = F.dropout(torch.cat([text_BTD, seen_BSD], dim=1), cast(float, self.dropout), self.training)
        if attention_mask is None or attention_mask.shape != hidden.shape[:2]:
            shape = None if attention_mask is None else tuple(attention_mask.shape)
            raise ValueError(f"attention_mask is {shape}: expected {tuple(hidden.shape[:2])}, text and pictures")
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)


class VLBart(BartForConditionalGeneration):
    """BART with the joint encoder; all else, `generate` among it, is transformers' own.

    The mask that it takes is that of text and pictures together, for the decoder's view of them too.
    """

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.model.encoder = JointEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        encoder_outputs: Any = None,
        **rest: Any,
    ) -> Any:
        """As `BartForConditionalGeneration.forward`, with the features (B, P, R, F) of `JointEncoder`."""
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(input_ids, attention_mask, features)
        return super().forward(attention_mask=attention_mask, encoder_outputs=encoder_outputs, **rest)


def open_vl_bart(
    folder: Path, feature_size: int, seed: int, dtype: str = "float32"
) -> tuple[VLBart, PreTrainedTokenizerBase]:
    """VL-BART of a folder with BART (facebook/bart-base, say) or with a VL-BART saved by `save_pretrained`.

    What the folder does not hold is drawn from `seed` alone, N(0, config.init_std), biases zero: the visual embedding
    and the rows of the 200 tokens, which are used (as the order of regions) though an adapter never trains them.
    Raises CheckpointError as `models.open` does, and for features of another size than the folder's.
    """
    tensors = refuse_unsafe(folder)
    config = BartConfig.from_pretrained(folder, local_files_only=True)
    if (held := getattr(config, "feature_size", feature_size)) != feature_size:
        raise CheckpointError(f"{folder}: its visual embedding takes features of {held} numbers, not {feature_size}")
    if config.model_type != "bart" or config.encoder_layerdrop:
        raise CheckpointError(f"{folder}: give a BART without layer drop (a {config.model_type} is in it)")
    config.feature_size = feature_size
    tokenizer = open_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fill(folder, VLBart, dtype, tensors, drawn="model.encoder.visual_embedding.", config=config)
        if len(tokenizer) > cast(nn.Embedding, model.get_input_embeddings()).num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # as transformers 4.2.1 did
    return cast(VLBart, model), tokenizer
