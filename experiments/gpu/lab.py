"""What the stages use of the library, imported in one place.

The Trainer's side is imported where it is used (`child`): it needs more packages than the rest, and a machine that
lacks one of them loses that cell alone.
"""

from __future__ import annotations

from dora_lab import Method, detach, inject, merge
from dora_lab.decompose import magnitude
from dora_lab.distributed import shard
from dora_lab.methods import dora_autograd as products
from dora_lab.methods import narrow
from dora_lab.methods.catalog import methods
from dora_lab.methods.inject import adapted
from dora_lab.probing.callback import DecompositionCallback
from dora_lab.probing.saved_models import probe as probe_saved
from dora_lab.runs import provenance

__all__ = [
    "DecompositionCallback",
    "Method",
    "adapted",
    "detach",
    "inject",
    "magnitude",
    "merge",
    "methods",
    "narrow",
    "probe_saved",
    "products",
    "provenance",
    "shard",
]
