"""How a family of models is fed and asked: items as tokens and features, a micro-batch, its loss, answers.

Which family a model is of, its spec says (`model.family`). The order of items and the step are `training`'s, rows and
scores `evaluation`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers import ProcessorMixin

from dora_lab.forms.decoder import Decoder
from dora_lab.forms.form import Form
from dora_lab.forms.llava import Llava
from dora_lab.forms.vl_bart import VLBartForm
from dora_lab.spec import Spec
from dora_lab.tasks.pictures import Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Decoder", "Form", "Llava", "VLBartForm", "form_of"]


def form_of(
    spec: Spec, model: Any, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, pictures: Pictures | None
) -> Form:
    """The form of a run's model; pictures: those that its items show. A LLaVA is given with its processor."""
    if isinstance(tokenizer, ProcessorMixin):
        return Llava(tokenizer)
    if pictures is not None:
        return VLBartForm.of(spec, model, tokenizer, pictures)
    return Decoder(cast(int, tokenizer.pad_token_id), spec.data.pad_to_multiple_of)
