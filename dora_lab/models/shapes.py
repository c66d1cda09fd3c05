"""Shapes of the models that the paper fine-tunes, and what follows from them: how many parameters a method trains.

Arithmetic on numbers of a config.json (standard library only): nothing is loaded, so a table or a cost estimate has the
shapes of a 13B model at once. `tests/test_parameters.py` holds it against real modules on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_lab.methods.catalog import catalog, entry_of, is_counted
from dora_lab.spec import Method, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of the Llama family; no biases, two norms a layer and one at the end."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    head: int | None = None  # width of an attention head; None: hidden / heads
    tied: bool = False  # output embedding = input embedding
    # of a LLaVA: parameters of its frozen tower and of its projector, tokens that the tower reads of an image
    tower: int = 0
    projector: int = 0
    patches: int = 0

    @property
    def attention(self) -> int:
        """Width of all attention heads together."""
        return self.heads * (self.head or self.hidden // self.heads)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer: leaf name -> (out, in)."""
        narrow = self.attention * self.key_value_heads // self.heads
        return {
            "q_proj": (self.attention, self.hidden),
            "k_proj": (narrow, self.hidden),
            "v_proj": (narrow, self.hidden),
            "o_proj": (self.hidden, self.attention),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def parameters(self) -> int:
        """Parameters of the base model."""
        linear = sum(out * width for out, width in self.matrices().values())
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (linear + 2 * self.hidden) + self.hidden + embeddings + self.tower + self.projector

    def trained(self, method: Method) -> int:
        """Parameters that `method` trains, by the arithmetic that its file gives (see `methods.catalog`).

        Raises ValueError for a method that is not there or gives none, a module that is no linear layer of the model,
        and for ranks that differ by module (`rank_pattern`), a `scope` and parameters that train whole (`also_train`).
        Of a LLaVA the projector trains besides and the tower does not, as experiment visual_instruction says it.
        """
        if self.tower:
            words = replace(self, tower=0, projector=0, patches=0)
            return words.trained(replace(method, scope=None, also_train=())) + self.projector
        if not is_counted(method):
            counted = ", ".join(name for name, entry in catalog().items() if entry.parameters is not None)
            raise ValueError(
                f"method '{method.name}' with rank {method.rank}, rank_pattern {method.rank_pattern}, scope "
                f"{method.scope}, also_train {method.also_train}: parameters are counted for {counted}, with one rank "
                "where there is a rank and none of the other three"
            )
        known = entry_of(method.name)
        if not known.adapts:
            return known.trained(model=self.parameters())
        linear = self.matrices()
        bare = [name for name in method.magnitude_modules if name not in method.target_modules]
        if unknown := [name for name in (*method.target_modules, *bare) if name not in linear]:
            raise ValueError(
                f"method.target_modules: '{unknown[0]}' is no linear layer here; {did_you_mean(unknown[0], linear)}"
            )
        ranks = dict.fromkeys(bare, 0) | dict.fromkeys(method.target_modules, method.rank or 0)
        sizes = ((rank, *linear[name]) for name, rank in ranks.items())
        return self.layers * sum(known.trained(rank=rank, outputs=out, inputs=width) for rank, out, width in sizes)


_7B = Shape(hidden=4096, intermediate=11008, layers=32, heads=32, key_value_heads=32, vocabulary=32000)
_13B = Shape(hidden=5120, intermediate=13824, layers=40, heads=40, key_value_heads=40, vocabulary=32000)
_8B = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, key_value_heads=8, vocabulary=128256)

# the paper's name of a model: its shape, and the hub ids that `experiments` take it from (case does not matter)
PAPER: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "LLaMA-7B": (_7B, ("yahma/llama-7b-hf",)),
    "LLaMA-13B": (_13B, ("yahma/llama-13b-hf",)),
    "LLaMA2-7B": (_7B, ("meta-llama/Llama-2-7b-hf",)),
    "LLaMA3-8B": (_8B, ("meta-llama/Meta-Llama-3-8B",)),
}

# of experiments' own names of folders, which no paper has
OTHERS = {"llava-1.5-7b-base": replace(_7B, vocabulary=32001, tower=303_507_456, projector=20_979_712, patches=577)}


def printed_name(model: str) -> str | None:
    """The paper's name for a hub id, or for a folder of that model's own name ("llama-7b-hf"); None if it has none.

    A name proves nothing: compare `Shape.parameters` with what a record counts.
    """
    leaf = model.rsplit("/", 1)[-1].lower()
    return next((name for name, (_, ids) in PAPER.items() if leaf in {i.rsplit("/", 1)[-1].lower() for i in ids}), None)


def of_folder(folder: Path) -> Shape:
    """The shape in the config.json of a saved model; raises ValueError naming file and field."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; give the folder of a saved model") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if config.get("model_type") == "llava":
        return _llava(file, config)
    return _decoder(file, config)


def _llava(file: Path, config: dict[str, Any]) -> Shape:
    """A LLaVA's, its tower CLIP's."""
    try:
        sight = config["vision_config"]
        hidden, inner = sight["hidden_size"], sight["intermediate_size"]
        patches = (sight["image_size"] // sight["patch_size"]) ** 2 + 1
        layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
        tower = hidden + 3 * sight["patch_size"] ** 2 * hidden + patches * hidden + 4 * hidden
        tower += sight["num_hidden_layers"] * layer
        words = _decoder(file, config["text_config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: a LLaVA without {error} in it; save the model again") from None
    projector = words.hidden * (hidden + words.hidden + 2)
    return replace(words, tower=tower, projector=projector, patches=patches)


def _decoder(file: Path, config: dict[str, Any]) -> Shape:
    names = {
        "hidden": "hidden_size", "intermediate": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "vocabulary": "vocab_size",
    }  # fmt: skip
    if missing := [name for name in names.values() if not isinstance(config.get(name), int)]:
        raise ValueError(f"{file}: field '{missing[0]}' is not a whole number; is this a decoder of the Llama family?")
    return Shape(
        **{field: config[name] for field, name in names.items()},
        key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head=config.get("head_dim"),
        tied=bool(config.get("tie_word_embeddings")),
    )
